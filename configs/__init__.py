"""One file per run: `get_config(stage)` returns its dataclass."""
