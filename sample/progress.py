"""Bars on a terminal: images, and steps where the program reports them."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import tqdm

from ldm_jax.sample.options import Options


class Bars(NamedTuple):
    """Functions that advance the bars."""

    images: Callable[[int], None]
    """Called with the number of images done."""
    step: Callable[[], None] | None
    """Called at every step of the solver, from inside the program; None: without a bar."""


def resolved(options: Options) -> str:
    """Mode of `auto` here: a bar of steps where they take long and stderr is a terminal.

    A program from a file reports no steps. Several processes must run the same program, which
    therefore cannot depend on whether one of them has a terminal.
    """
    images = "images" if options.from_export is not None else "steps"
    if options.progress == "steps":
        return images
    if options.progress != "auto":
        return options.progress
    if not sys.stderr.isatty():
        return "none"
    return images if jax.default_backend() == "cpu" and jax.process_count() == 1 else "images"


@contextlib.contextmanager
def bars(mode: str, images: int, done: int, steps: int) -> Iterator[Bars]:
    """Bars for `images`, of which `done` are finished, and for `steps` in all calls together.

    mode: see `resolved`.
    """
    with contextlib.ExitStack() as stack:
        hidden = mode == "none" or jax.process_index() != 0
        whole = tqdm.tqdm(total=images, initial=done, unit="image", position=0, disable=hidden)
        stack.enter_context(whole)
        if mode != "steps":
            yield Bars(whole.update, None)
            return
        each = stack.enter_context(
            tqdm.tqdm(total=steps, unit="step", position=1, leave=False, disable=hidden)
        )
        yield Bars(whole.update, lambda: each.update(1))
