"""Tables that pair the names and layouts of PyTorch checkpoints with ours, used in both directions.

An entry says which tensor of the checkpoint (CompVis names) fills which parameters of ours. Our
paths are those of diffusers' Flax models, and torch diffusers' (`.N` written `_N`) where Flax lacks
a part: `class_embedding`, a UNet without cross-attention, `resblock_updown`. Attention at a level
of the first stage is `down_blocks_I/attentions_J` as in torch, with the leaves of Flax's middle
block.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import einops
import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from ldm_jax import finite, sharding

Place = Callable[[str, np.ndarray], Any]  # our path, host array -> leaf of the tree


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
    """Rearrange an array, a list of arrays to stack, or the shapes of either."""
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


class Entry(NamedTuple):
    """One tensor of a checkpoint; with several paths of ours, its first axis there is theirs."""

    torch: str
    ours: tuple[str, ...]
    layout: Layout


Entries = Iterator[Entry]


def prefixed(entries: list[Entry], torch: str, ours: str) -> list[Entry]:
    """Put `torch` and `ours` before the names of a part of a model: the entries of the whole."""
    return [Entry(torch + e.torch, tuple(ours + p for p in e.ours), e.layout) for e in entries]


def from_torch(
    entries: list[Entry],
    state_dict: Mapping[str, Any],
    shapes: dict,
    *,
    dtype: Any = np.float32,
    place: Place | None = None,
    where: str = "checkpoint",
) -> dict:
    """Our parameters: nested dict of NumPy arrays of `dtype`, or of shapes for a dict of shapes.

    state_dict: torch name -> ShapeDtypeStruct, NumPy array, or anything with `.shape`, `.dtype` and
        `__array__`, which is called once, when its turn comes; every name is used once.
    shapes: nested dict of our modules' parameters (from `jax.eval_shape` of their `init`).
    place: takes each array as soon as it is made, so that one tensor at a time is on the host;
        None keeps NumPy arrays.
    A 1x1 convolution may be saved as a dense layer, and the reverse.
    Raises ValueError, which begins with `where` (the file) and lists missing, unknown and wrongly
    shaped tensors, before anything is read; or names a tensor that is not finite as `dtype`.
    """
    refuse(misfits(entries, state_dict, shapes), f"{where} does not fit the config")
    wanted = _torch_shapes(entries, shapes)
    flat: dict[str, Any] = {}
    for entry in entries:
        tensor = _reshaped(_cast(state_dict[entry.torch], dtype), wanted[entry.torch])
        if isinstance(tensor, np.ndarray):
            finite.check_array(tensor, entry.torch, where)
        for path, x in _entry_to_ours(entry, tensor).items():
            flat[path] = x if place is None else place(path, x)
    return traverse_util.unflatten_dict(flat, sep="/")


def misfits(entries: list[Entry], state_dict: Mapping[str, Any], shapes: dict) -> list[str]:
    """Faults that `from_torch` would refuse: missing, unknown and wrongly shaped tensors."""
    wanted = _torch_shapes(entries, shapes)
    problems = [f"missing {name}" for name in wanted if name not in state_dict]
    problems += [f"unknown {name}" for name in state_dict if name not in wanted]
    problems += [
        f"{name} is {tuple(state_dict[name].shape)}, not {shape}"
        for name, shape in wanted.items()
        if name in state_dict and _matrix(state_dict[name].shape) != _matrix(shape)
    ]
    return problems


def _torch_shapes(entries: list[Entry], shapes: dict) -> dict[str, tuple[int, ...]]:
    """{name: expected shape} of the tensors of a checkpoint."""
    return {name: tuple(x.shape) for name, x in to_torch(entries, shapes).items()}


def _matrix(shape: Any) -> tuple[int, ...]:
    """A shape without trailing ones after its second axis: a 1x1 convolution as a dense layer."""
    shape = tuple(shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _reshaped(x: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, x.dtype)
    return x.reshape(shape)


def refuse(problems: list[str], what: str) -> None:
    """ValueError with `what` and the first 20 problems, if there are any."""
    if problems:
        more = f", and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{what}: {'; '.join(problems[:20])}{more}")


def _entry_to_ours(entry: Entry, tensor: Any) -> dict[str, Any]:
    x = entry.layout.to_ours(tensor)
    if len(entry.ours) == 1:
        return {entry.ours[0]: x}
    if isinstance(x, jax.ShapeDtypeStruct):
        return dict.fromkeys(entry.ours, jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
    return dict(zip(entry.ours, x, strict=True))


def to_torch(
    entries: list[Entry], params: dict, *, dtype: Any = None, lazy: bool = False
) -> dict[str, Any]:
    """Inverse of `from_torch`: torch name -> NumPy array, or shape where `params` has those.

    dtype: of the tensors; None keeps that of the parameters.
    lazy: gives a `Pending` for each array, for a writer that takes one at a time.
    Raises ValueError that lists missing and unknown parameters, and duplicate names.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    ours = [path for entry in entries for path in entry.ours]
    problems = [f"missing {path}" for path in ours if path not in flat]
    problems += [f"unknown {path}" for path in sorted(set(flat) - set(ours))]
    for names in (ours, [entry.torch for entry in entries]):
        problems += [f"{name} stands {n} times" for name, n in Counter(names).items() if n > 1]
    refuse(problems, "parameters do not fit the model")
    pending = {e.torch: Pending(e, [flat[p] for p in e.ours], dtype) for e in entries}
    return pending if lazy else {name: x.made() for name, x in pending.items()}


class Pending:
    """A tensor in PyTorch's layout, made from our parameters each time `np.asarray` asks for it."""

    def __init__(self, entry: Entry, parts: list[Any], dtype: Any):
        self._entry, self._parts = entry, parts
        self.dtype = np.dtype(dtype or parts[0].dtype)

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.made(shapes=True).shape)

    def made(self, shapes: bool = False):
        """The array, or its shape where the parameters are shapes or `shapes` asks for that."""
        parts = self._parts
        if shapes:
            parts = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in parts]
        cast = [_cast(x, self.dtype) for x in parts]
        for before, after in zip(parts, cast, strict=True):
            if isinstance(after, np.ndarray) and after.dtype != before.dtype:
                finite.check_array(after, self._entry.torch, "the model")
        parts = cast
        return self._entry.layout.to_torch(parts[0] if len(parts) == 1 else parts)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.made().astype(dtype or self.dtype, copy=bool(copy))


def _cast(x: Any, dtype: Any):
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, dtype)
    with np.errstate(over="ignore"):  # callers check for overflow, and name the tensor
        return np.asarray(x).astype(dtype, copy=False)


def placer(shapes: dict, mesh: Mesh | None) -> Place:
    """`place` of `from_torch`: onto the shards of the training rules, or the default device.

    It waits for each array, so that no queue of host copies builds up.
    """
    if mesh is None:
        # jnp.asarray would compile, and keep, a program for each shape
        return lambda path, x: jax.device_put(x).block_until_ready()
    shards = sharding.by_rules(shapes, sharding.RULES, mesh)
    shards = traverse_util.flatten_dict(shards, sep="/")

    def place(path: str, x: np.ndarray) -> jax.Array:
        # each device is given its own slice: none holds the whole
        return jax.make_array_from_callback(
            x.shape, shards[path], lambda index: x[index]
        ).block_until_ready()

    return place


# --- layers: a weight, and a bias unless said otherwise ------------------------------------------


def layer(torch: str, ours: str, layout: Layout, bias: bool = True) -> Entries:
    yield Entry(f"{torch}.weight", (f"{ours}/kernel",), layout)
    if bias:
        yield Entry(f"{torch}.bias", (f"{ours}/bias",), VECTOR)


def norm(torch: str, ours: str) -> Entries:
    yield Entry(f"{torch}.weight", (f"{ours}/scale",), VECTOR)
    yield Entry(f"{torch}.bias", (f"{ours}/bias",), VECTOR)
