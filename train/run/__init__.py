"""The surroundings of a training step: loop, logs, measurements, stops, restarts."""
