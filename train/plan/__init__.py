"""`ldm-train plan`: programs compiled for devices that are not there."""
