"""Several processes draw one list: all agree on what is drawn, each writes its own images.

Batches are split over the devices of all processes, as `sharding.place` lays them.
"""

import contextlib
import time
import uuid
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ldm_jax.runtime import processes

SECONDS = 60
"""Seconds to wait for a file of another process: network file systems cache directories."""


def own(array: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """(indices int [n], values [n, ...]) along axis 0 of a split array that this process holds.

    An index that several processes hold belongs to the one with the first copy, so that all of them
    together have every one once.
    """
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    shards.sort(key=lambda shard: shard.index[0].indices(len(array))[0])
    if not shards:
        return np.zeros(0, int), np.zeros((0, *array.shape[1:]), array.dtype)
    indices = [np.arange(*shard.index[0].indices(len(array))) for shard in shards]
    return np.concatenate(indices), np.concatenate([np.asarray(shard.data) for shard in shards])


def whole(array: jax.Array) -> np.ndarray:
    """All of an array in every process, also of one that is split over them."""
    if jax.process_count() == 1:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raise in every process if one raises inside; no process leaves before all have come."""
    if jax.process_count() == 1:
        yield
        return
    error = None
    try:
        yield
    except Exception as refusal:
        error = refusal
    refused = multihost_utils.process_allgather(np.array(error is not None)).reshape(-1)
    if error is not None:
        raise error
    if refused.any():
        which = ", ".join(str(i) for i in np.flatnonzero(refused))
        raise RuntimeError(f"process {which} of {len(refused)} refuses; it says why in its log")


def same(values: Sequence[bool]) -> np.ndarray:
    """The values that process 0 has, in every process, bool [n]."""
    mine = np.asarray(values, bool)
    return mine if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(mine)


def check_shared(out: epath.Path) -> None:
    """ValueError in every process if one of them sees another folder under this name."""
    if jax.process_count() == 1:
        return
    token = multihost_utils.broadcast_one_to_all(np.frombuffer(uuid.uuid4().bytes, np.uint8))
    probe = out / f".shared_{bytes(np.asarray(token)).hex()}"
    if jax.process_index() == 0:
        probe.write_bytes(b"")
    processes.barrier("shared_written")
    with together():
        until = time.monotonic() + SECONDS
        while not probe.exists():
            if time.monotonic() > until:
                raise ValueError(
                    f"--out {out}: process {jax.process_index()} sees another folder there than"
                    " process 0; give one on storage that all hosts share"
                )
            time.sleep(0.1)
    if jax.process_index() == 0:
        probe.unlink()
