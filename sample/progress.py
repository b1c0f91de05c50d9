"""The bar of a sampling command: images, or steps where the program reports them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from ldm_jax.runtime import progress
from ldm_jax.sample.options import Options


class Bars(NamedTuple):
    """Functions that advance the bars."""

    images: Callable[[int], None]
    """Called with the number of images done."""
    step: Callable[[], None] | None
    """Called at every step of the solver, from inside the program; None: without a bar."""
    doing: Callable[[str], contextlib.AbstractContextManager]
    """Context that shows what happens beside sampling, as "compiling"."""


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
    if not progress.is_watched():
        return "none"
    return images if jax.default_backend() == "cpu" and jax.process_count() == 1 else "images"


@contextlib.contextmanager
def bars(mode: str, images: int, done: int, steps: int) -> Iterator[Bars]:
    """A bar of `images`, of which `done` are finished, or of `steps` in all calls together.

    mode: see `resolved`.
    """
    hidden = mode == "none" or jax.process_index() != 0
    if mode != "steps":
        with progress.Bar(
            images, unit="image", does="sampling", initial=done, hidden=hidden
        ) as bar:
            yield Bars(bar.update, None, bar.doing)
        return
    with progress.Bar(steps, unit="step", does="sampling", hidden=hidden) as bar:

        def made(number: int) -> None:
            nonlocal done
            done += number
            bar.note(f"{done}/{images} images")
            bar.refresh()

        made(0)
        yield Bars(made, lambda: bar.update(), bar.doing)
