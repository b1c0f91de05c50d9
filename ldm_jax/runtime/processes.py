"""Communication between the processes of a run outside of any step; all call each function."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")


def any_of(flag: bool) -> bool:
    """True in every process if `flag` is true in any."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def gathered(numbers: Sequence[int]) -> np.ndarray:
    """[processes, n]: the n numbers of each process."""
    mine = np.asarray(numbers, np.int32)
    if jax.process_count() == 1:
        return mine[None]
    return np.asarray(multihost_utils.process_allgather(mine))


def union(numbers: set[int]) -> set[int]:
    """The numbers >= 0 that any process has."""
    if jax.process_count() == 1:
        return numbers
    most = int(np.max(multihost_utils.process_allgather(np.asarray(len(numbers), np.int32))))
    if most == 0:
        return set()
    mine = np.full(most, -1, np.int32)
    mine[: len(numbers)] = sorted(numbers)
    gathered = multihost_utils.process_allgather(mine)
    return {int(x) for x in gathered.reshape(-1) if x >= 0}


def broadcast_from_first(numbers: list[int], most: int = 64) -> list[int]:
    """The last `most` of the numbers >= 0 that process 0 has."""
    if jax.process_count() == 1:
        return numbers[-most:]
    told = np.full(most, -1, np.int32)
    told[: len(numbers[-most:])] = numbers[-most:]
    return [int(x) for x in multihost_utils.broadcast_one_to_all(told) if x >= 0]


def on_all(what: str, call: Callable[[], T], expected: type[Exception]) -> T:
    """call() where it succeeds on every process; else every process raises.

    Raises `expected` if every failure was of that class, with a message about `what` on the
    processes that did not fail; else each failed process raises its own error and the others
    RuntimeError.
    """
    result, failed = None, None
    try:
        result = call()
    except Exception as error:
        failed = error
    if jax.process_count() > 1:
        code = 0 if failed is None else 1 if isinstance(failed, expected) else 2
        codes = multihost_utils.process_allgather(np.asarray(code, np.int32))
        worst = int(np.argmax(codes))
        if codes[worst] == 1 and failed is None:
            raise expected(f"{what}: process {worst} cannot read it, see its log")
        if codes[worst] == 2 and code != 2:
            raise RuntimeError(f"{what}: process {worst} cannot read it, see its log")
    if failed is not None:
        raise failed
    return result


def barrier(name: str) -> None:
    """Wait until every process has come here; a single process goes on at once."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"ldm_jax_{name}")
