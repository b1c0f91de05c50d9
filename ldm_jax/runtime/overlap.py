"""Work for the devices, one piece ahead of the host's work on the results."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetch(pieces: Iterable[T], dispatch: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """(piece, dispatch(piece)) in order, each when the next has been dispatched, or has failed.

    A dispatch may wait for its results, as on CPUs with callbacks: Ctrl-C during it must not cost
    the results of the piece before, which are complete.
    """
    before = None
    for piece in pieces:
        try:
            now = (piece, dispatch(piece))
        except BaseException:
            if before is not None:
                yield before
            raise
        if before is not None:
            yield before
        before = now
    if before is not None:
        yield before
