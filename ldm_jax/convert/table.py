"""Tables that pair the names and layouts of PyTorch checkpoints with ours, used in both directions.

A row says which tensor of the checkpoint (CompVis names) fills which parameters of ours. Our paths
are those of diffusers' Flax models, and torch diffusers' (`.N` written `_N`) where Flax lacks a
part: `class_embedding`, a UNet without cross-attention, `resblock_updown`. Attention at a level of
the first stage is `down_blocks_I/attentions_J` as in torch, with the leaves of Flax's middle block.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import einops
import jax
import numpy as np
from flax import traverse_util


class Layout(NamedTuple):
    """Axes of a tensor in PyTorch and in ours, as einops writes them, and sizes they need."""

    torch: str
    ours: str
    sizes: tuple[tuple[str, int], ...] = ()

    def to_ours(self, x):
        return _rearrange(x, f"{self.torch} -> {self.ours}", self.sizes)

    def to_torch(self, x):
        return _rearrange(x, f"{self.ours} -> {self.torch}", self.sizes)


def _rearrange(x, pattern: str, sizes: tuple[tuple[str, int], ...]):
    """Of an array, a list of arrays to stack, or the shapes of either."""
    change = functools.partial(einops.rearrange, pattern=pattern, **dict(sizes))
    if isinstance(jax.tree.leaves(x)[0], jax.ShapeDtypeStruct):
        return jax.eval_shape(change, x)
    return change(x)


VECTOR = Layout("c", "c")
EMBEDDING = Layout("n c", "n c")
CONV = Layout("o i h w", "h w i o")
DENSE = Layout("o i", "i o")
DENSE_AS_CONV1D = Layout("o i 1", "i o")
DENSE_AS_CONV2D = Layout("o i 1 1", "i o")


class Row(NamedTuple):
    """One tensor of a checkpoint; with several paths of ours, its first axis there is theirs."""

    torch: str
    ours: tuple[str, ...]
    layout: Layout


Rows = Iterator[Row]


def from_torch(rows: list[Row], state_dict: Mapping[str, Any], shapes: dict) -> dict:
    """Our parameters: nested dict of float32 NumPy arrays, or of shapes if `state_dict` has those.

    state_dict: torch name -> NumPy array or ShapeDtypeStruct; every name is used once.
    shapes: nested dict of what our modules expect (from `jax.eval_shape` of their `init`).
    Raises ValueError that lists missing, unknown and wrongly shaped tensors.
    """
    wanted = _torch_shapes(rows, shapes)
    problems = [f"missing {name}" for name in wanted if name not in state_dict]
    problems += [f"unknown {name}" for name in state_dict if name not in wanted]
    problems += [
        f"{name} is {tuple(state_dict[name].shape)}, not {shape}"
        for name, shape in wanted.items()
        if name in state_dict and tuple(state_dict[name].shape) != shape
    ]
    _refuse(problems, "checkpoint does not fit the config")
    flat = {}
    for row in rows:
        x = row.layout.to_ours(_float32(state_dict[row.torch]))
        if len(row.ours) == 1:
            flat[row.ours[0]] = x
        elif isinstance(x, jax.ShapeDtypeStruct):
            flat |= dict.fromkeys(row.ours, jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
        else:
            flat |= dict(zip(row.ours, x, strict=True))
    return traverse_util.unflatten_dict(flat, sep="/")


def to_torch(rows: list[Row], params: dict) -> dict[str, Any]:
    """Inverse of `from_torch`: torch name -> NumPy array, or shape where `params` has those.

    Raises ValueError that lists missing and unknown parameters.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    ours = [path for row in rows for path in row.ours]
    problems = [f"missing {path}" for path in ours if path not in flat]
    problems += [f"unknown {path}" for path in sorted(set(flat) - set(ours))]
    _refuse(problems, "parameters do not fit the model")
    return {row.torch: _row_to_torch(row, flat) for row in rows}


def _row_to_torch(row: Row, flat: dict[str, Any]):
    parts = [_float32(flat[path]) for path in row.ours]
    return row.layout.to_torch(parts[0] if len(parts) == 1 else parts)


def _torch_shapes(rows: list[Row], shapes: dict) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in to_torch(rows, shapes).items()}


def _float32(x):
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, np.float32)
    return np.asarray(x, np.float32)


def _refuse(problems: list[str], what: str) -> None:
    if problems:
        more = f", and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{what}: {'; '.join(problems[:20])}{more}")


# --- layers: a weight, and a bias unless said otherwise ------------------------------------------


def layer(torch: str, ours: str, layout: Layout, bias: bool = True) -> Rows:
    yield Row(f"{torch}.weight", (f"{ours}/kernel",), layout)
    if bias:
        yield Row(f"{torch}.bias", (f"{ours}/bias",), VECTOR)


def norm(torch: str, ours: str) -> Rows:
    yield Row(f"{torch}.weight", (f"{ours}/scale",), VECTOR)
    yield Row(f"{torch}.bias", (f"{ours}/bias",), VECTOR)
