"""One visible training loop per recipe."""
