"""Progress of a command: a bar on a terminal and in a notebook, plain lines elsewhere."""

import contextlib
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import TextIO

from tqdm import asyncio, auto

# steps/s also where a step takes seconds; tqdm would turn it into s/step
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
PACE = 15.0  # seconds between two plain lines
TICK = 1.0  # seconds between two looks at the time that a pause takes

_open: weakref.WeakSet["Bar"] = weakref.WeakSet()


def is_watched() -> bool:
    """Tell whether stderr is a terminal, or this is a notebook: a line can be drawn anew."""
    return sys.stderr.isatty() or auto.tqdm is not asyncio.tqdm_asyncio


def close_all() -> None:
    """End the line of every bar, so that what is written next begins a line of its own."""
    for bar in list(_open):
        bar.close()


class Bar:
    """Counts of `total`, with rate and time left; use it as a context, or close it."""

    def __init__(
        self, total: int, *, unit: str, does: str, initial: int = 0, hidden: bool = False
    ) -> None:
        """does: what the command does while it counts, as "training", in front of the bar.

        hidden: draw nothing.
        """
        self.does, self.watched = does, is_watched()
        shape = {"bar_format": BAR, "dynamic_ncols": True, "mininterval": 0.5}
        if not self.watched:
            shape = {"bar_format": LINE, "mininterval": PACE, "delay": 1e-9, "file": _Lines()}
        self.drawn = auto.tqdm(
            total=total, initial=initial, unit=unit, desc=does, disable=hidden, smoothing=0.1,
            **shape,
        )  # fmt: skip
        measure = getattr(self.drawn, "dynamic_ncols", None)
        if callable(measure):  # a terminal's ^C at the end of a full line would break it

            def narrower(stream: TextIO) -> tuple[int | None, int | None]:
                columns, lines = measure(stream)
                return columns and columns - len("^C "), lines

            self.drawn.dynamic_ncols = narrower
        _open.add(self)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def count(self) -> int:
        """Number done."""
        return self.drawn.n

    def update(self, number: int = 1) -> None:
        """Count `number` more."""
        self.drawn.update(number)

    def note(self, text: str) -> None:
        """Say `text` behind the rate from the next drawing on."""
        self.drawn.set_postfix_str(text, refresh=False)

    def refresh(self) -> None:
        """Draw it now, where it can be drawn anew."""
        if self.watched:
            self.drawn.refresh()

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Show `what` and its seconds in front of the bar; its time leaves the rate alone."""
        ended = threading.Event()
        if self.watched and not self.drawn.disable:
            threading.Thread(target=self._tick, args=(what, ended), daemon=True).start()
        try:
            yield
        finally:
            with self.drawn.get_lock():
                ended.set()
                self.drawn.unpause()
                self.drawn.set_description_str(self.does, refresh=self.watched)

    def _tick(self, what: str, ended: threading.Event) -> None:
        start = time.monotonic()
        while not ended.is_set():
            seconds = time.monotonic() - start
            shown = f"{what} {seconds:.0f} s" if seconds >= TICK else what
            with self.drawn.get_lock():
                if not ended.is_set():
                    self.drawn.set_description_str(shown)
            ended.wait(TICK)

    def close(self) -> None:
        """Draw it for the last time; it stays."""
        _open.discard(self)
        self.drawn.close()


class _Lines:
    """A stream for tqdm that writes what it draws as lines on stderr, none twice in a row."""

    def __init__(self) -> None:
        self.last = ""

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text and text != self.last:
            self.last = text
            sys.stderr.write(f"{text}\n")

    def flush(self) -> None:
        sys.stderr.flush()
