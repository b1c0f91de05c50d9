"""Checksums of trees of arrays, independent of device and mesh, and of the JSON beside them."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import sharding


def part_checksums(parts: Mapping[str, Any], what: str) -> dict[str, int]:
    """{part: checksum}. ValueError names the parts and paths that hold a NaN or an infinity."""
    sums: dict[str, int] = {}
    bad: list[str] = []
    for part, tree in parts.items():
        facts = _facts(tree)
        sums[part] = _total(facts)
        bad += [f"{part}/{name}" for name, (count, _) in facts.items() if count]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ValueError(
            f"{what}: not written, because not finite: {', '.join(bad[:3])}{more}; go on from the"
            " last one, with a lower learning rate or a clipped gradient"
        )
    return sums


def tree_checksum(tree: Any) -> int:
    """The same number for a tree on any mesh or on the host; another one if any one bit differs.

    Orbax's files carry no checksum of array data: a flipped bit would go unnoticed.
    """
    return _total(_facts(tree))


def seal(meta: Mapping[str, Any]) -> int:
    """Checksum of all of meta but itself."""
    rest = {name: value for name, value in meta.items() if name != "seal"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def sealed(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {**meta, "seal": seal(meta)}


def _total(facts: Mapping[str, tuple[int, int]]) -> int:
    # weighted by path, so that exchanged arrays are seen; odd weights lose no bit modulo 2**32
    return sum((zlib.crc32(n.encode()) | 1) * bits for n, (_, bits) in facts.items()) % 2**32


def _facts(tree: Any) -> dict[str, tuple[int, int]]:
    """{path: (number of values that are not finite, sum of the values' bits modulo 2**32)}."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    # leaf by leaf: one program over all leaves of a large model compiles for half a minute
    facts = []
    for _, x in flat:
        facts.append(_host_facts(x) if isinstance(x, np.ndarray) else _device_facts(x))
        # CPU devices share a pool of threads: several all-reduces in flight can take all threads
        # and wait for each other for ever, so one finishes before the next begins
        if isinstance(x, jax.Array) and next(iter(x.sharding.device_set)).platform == "cpu":
            facts[-1].block_until_ready()
    facts = jax.device_get(facts)
    return {sharding.path_name(p): (int(f[0]), int(f[1])) for (p, _), f in zip(flat, facts)}


@jax.jit
def _device_facts(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x  # XLA cannot bitcast bool
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    bad = jnp.sum(~jnp.isfinite(x), dtype=jnp.uint32)
    return jnp.stack([bad, jnp.sum(bits, dtype=jnp.uint32)])


def _host_facts(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x).view(f"uint{8 * x.dtype.itemsize}")
    bad = np.sum(~np.isfinite(x), dtype=np.uint32)
    return np.stack([bad, np.sum(bits, dtype=np.uint32)])
