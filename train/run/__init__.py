"""What surrounds a training step: the loop, what is said and measured, stops, restarts."""
