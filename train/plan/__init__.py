"""`ldm-train plan`: programs compiled for devices that this machine does not have."""
