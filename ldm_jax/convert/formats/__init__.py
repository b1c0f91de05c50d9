"""Checkpoint files of every format as flat state dicts, read lazily and without running code."""
