"""Bounds of a part of a checkpoint, checked before any of its arrays takes memory."""

import math
import os
import stat
from typing import Any

import jax
from etils import epath

from ldm_jax import sharding

RATIO = 2**15
"""Most bytes that one byte of a file unpacks to: Zstandard writes 128 KiB of equal ones in four."""
LONGEST = 16
"""Bytes of the longest number."""


def held_bytes(folder: epath.Path) -> int | None:
    """Bytes of all files below a folder; None on an object store, where each costs a request.

    ValueError for a pipe or a device, at which a reader would wait for ever.
    """
    if "://" in os.fspath(folder):
        return None
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            status = os.stat(os.path.join(parent, name))
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{os.path.join(parent, name)} is no regular file")
            total += status.st_size
    return total


def check_claims(saved: Any, held: int | None) -> None:
    """ValueError for arrays of more bytes than `held` bytes of files can unpack to.

    saved: tree of Orbax's metadata of arrays, which may claim any shape: an absent piece of an
    array reads as zeros.
    """
    claimed = 0
    for path, x in jax.tree_util.tree_leaves_with_path(saved):
        name, shape = sharding.path_name(path), getattr(x, "shape", None)
        if shape is None or getattr(x, "dtype", None) is None:
            raise ValueError(f"{name} is no array")
        if x.dtype.hasobject or x.dtype.itemsize > LONGEST or min(shape, default=0) < 0:
            raise ValueError(f"{name} is {x.dtype} {list(shape)}, which no array of ours is")
        pieces = getattr(x.storage, "chunk_shape", None) or ()
        claimed += max(math.prod(shape), math.prod(pieces)) * x.dtype.itemsize
    if held is not None and claimed > RATIO * held:
        raise ValueError(f"its arrays are said to be {claimed} bytes, but its files have {held}")


def check_fit(folder: epath.Path, saved: Any, wanted: Any, remedy: str, dtypes: bool) -> None:
    """ValueError, which ends with the remedy, for other arrays than those `wanted`.

    saved, wanted: trees of what has a shape and a dtype; the latter counts if `dtypes`.
    """

    def described(tree: Any) -> dict[str, str]:
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {
            sharding.path_name(p): f"{x.dtype if dtypes else ''}{list(x.shape)}" for p, x in flat
        }

    old, new = described(saved), described(wanted)
    odd = [n for n in sorted(old.keys() | new.keys()) if old.get(n) != new.get(n)]
    if odd:
        lines = [f"{n}: saved {old.get(n, 'not')}, expected {new.get(n, 'not')}" for n in odd[:3]]
        raise ValueError(
            f"{folder}: is of another model, {len(odd)} arrays differ"
            f" ({'; '.join(lines)}): {remedy}"
        )
