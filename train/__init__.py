"""Training: one visible loop per recipe."""
