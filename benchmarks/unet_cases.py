"""What both sides of `unet_vs_diffusers.py` share: cases, and equal numbers for both."""

import dataclasses
import math
import zlib
from collections.abc import Callable

import numpy as np
import sides

CONTEXT = (77, 768)  # tokens of a prompt, width of a token
LEARNING_RATE = 1e-4  # everything else of AdamW: torch's defaults, which are ours
KINDS = ("convolution", "dense", "attention", "norms", "elementwise", "copies", "AdamW", "rest")


@dataclasses.dataclass(frozen=True)
class Case:
    """One timing: the Stable Diffusion v1 UNet at some width, forward or a whole training step."""

    model_channels: int
    batch: int
    size: int
    """Height and width of the latents."""
    train: bool


CASES = {
    "full-forward-1": Case(320, 1, 64, train=False),
    "full-training-1": Case(320, 1, 32, train=True),
    **{f"reduced-forward-{b}": Case(64, b, 32, train=False) for b in (1, 4, 16)},
    **{f"reduced-training-{b}": Case(64, b, 32, train=True) for b in (1, 4, 16)},
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process is asked to do."""

    cases: tuple[str, ...]
    seconds: float
    """Timed runs of a case go on for so long, and for `sides.LEAST_RUNS` at least."""
    threads: int
    dtype: str
    platform: str
    variant: str
    """A setting of that side; see `unet_vs_diffusers.SIDES`."""
    split: bool
    """Also measure the time by kind of operation."""
    cache: str
    """Folder of compiled programs, so that a round does not compile what another one did."""


def draw(name: str, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    """float32 U(-scale, scale), a function of the name alone."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    x = random.random(shape, np.float32)
    x -= 0.5
    x *= 2 * scale
    return x


def parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The parameter that diffusers calls `name`, kernels as [(height, width,) in, out].

    PyTorch's default initialization; nothing is zero, so that every layer counts.
    """
    if len(shape) > 1:
        return draw(name, shape, 1 / math.sqrt(math.prod(shape[:-1])))
    return draw(name, shape, 0.02) + (1 if name.endswith("weight") else 0)


def inputs(case: Case) -> dict[str, np.ndarray]:
    """x and target [B, H, W, 4], t int32 [B], context [B, 77, 768]."""
    shape = (case.batch, case.size, case.size, 4)
    return {
        "x": draw("x", shape, 1.7),
        "target": draw("target", shape, 1.7),
        "t": (np.arange(case.batch, dtype=np.int32) * 61 + 500) % 1000,
        "context": draw("context", (case.batch, *CONTEXT), 1.7),
    }


def serve(run_case: Callable[[Job, Case], tuple[dict, np.ndarray | None]]) -> None:
    """Does the job of this process; see `sides`.

    `run_case` returns the figures of a case, and the output of a forward pass.
    """
    job, out = sides.asked(Job)
    found = {name: run_case(job, CASES[name]) for name in job.cases}
    figures = {name: figures for name, (figures, _) in found.items()}
    outputs = {name: output for name, (_, output) in found.items() if output is not None}
    sides.answer(out, {"cases": figures}, outputs)
