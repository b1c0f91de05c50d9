"""Limits of the sizes in a config: above those of any model, below those that cannot be built."""

import dataclasses
import math
from typing import Any

MOST = 2**24
"""Limit of any size: width, vocabulary, codes, timesteps, pixels."""
MOST_LEVELS = 16
MOST_BLOCKS = 1024
"""Limit of the blocks in one part of a model; the largest UNets have about a hundred."""
COUNTS = ("num_res_blocks", "num_layers", "transformer_depth", "stages")


def check(config: Any, where: str = "config") -> None:
    """ValueError for a number below 0 or above its limit; names the field."""
    blocks = 1
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{where}.{field.name}"
        if dataclasses.is_dataclass(value):
            check(value, name)
        elif isinstance(value, tuple):
            if len(value) > MOST_LEVELS:
                raise ValueError(f"{name} has {len(value)} levels, {MOST_LEVELS} are the most")
            for one in value:
                _check_size(one, name)
        else:
            _check_size(value, name)
        if field.name in COUNTS and value:
            blocks *= value + 1
        if field.name == "channel_mult":
            blocks *= max(1, len(value))
    if blocks > MOST_BLOCKS:
        raise ValueError(f"{where} has {_shown(blocks)} blocks in all, {MOST_BLOCKS} are the most")


def _check_size(value: Any, name: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}: give a finite number")
    if isinstance(value, int) and not 0 <= value <= MOST:
        raise ValueError(f"{name} is {_shown(value)}: give 0 to {MOST}")


def _shown(value: int) -> str:
    """The digits, if they are few: Python refuses to print integers of more than 4300."""
    return str(value) if abs(value) < 10**20 else f"a number of {value.bit_length()} bits"
