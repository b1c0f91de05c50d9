"""What a run stands on: command line, processes, storage, checkpoints, the run directory."""
