"""Conditioning: one file for each kind, with every function that other code needs of it.

A new kind is its config in `schema.conds`, its file here, and its line in `registry.KINDS`.
"""

from ldm_jax.conditioning.kind import Batch, Cond, Encode, Example, Kind, Sizes, at_step
from ldm_jax.conditioning.registry import (
    KINDS,
    build,
    check_batch,
    concat_channels,
    context_width,
    example,
    from_batch,
    has_null,
    init,
    kind_of,
    map_ids,
    name_of,
    needs,
    null_like,
    sampled_by,
)

__all__ = [
    "KINDS",
    "Batch",
    "Cond",
    "Encode",
    "Example",
    "Kind",
    "Sizes",
    "at_step",
    "build",
    "check_batch",
    "concat_channels",
    "context_width",
    "example",
    "from_batch",
    "has_null",
    "init",
    "kind_of",
    "map_ids",
    "name_of",
    "needs",
    "null_like",
    "sampled_by",
]
