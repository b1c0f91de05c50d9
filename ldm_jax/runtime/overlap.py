"""Work for the devices, one piece ahead of the host's work on the results."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetch(pieces: Iterable[T], dispatch: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """(piece, dispatch(piece)) in order, each when the next has been dispatched."""
    before = None
    for piece in pieces:
        now = (piece, dispatch(piece))
        if before is not None:
            yield before
        before = now
    if before is not None:
        yield before
