"""Ground of a run: command line, processes, storage, checkpoints, the run directory."""
