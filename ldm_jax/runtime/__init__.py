"""Infrastructure of a run: command line, processes, storage, checkpoints, run directory."""
