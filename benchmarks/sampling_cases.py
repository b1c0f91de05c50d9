"""What the sides of `sampling.py` share: cases, inputs, memory, and how a process is served."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sides
import unet_cases

CONTEXT = unet_cases.CONTEXT
GUIDANCE = 7.5
SCALE = 0.18215  # of Stable Diffusion's latents
IN_A_ROW = 8
"""Attentions timed together, each reading what the one before gave, as in a network."""
OPERATIONS = "operations"
"""The other kind of process: attention and matrix products alone."""
KINDS = ("convolution", "dense", "attention", "norms", "elementwise", "copies", "solver", "rest")


@dataclasses.dataclass(frozen=True)
class Case:
    """One timing: Stable Diffusion v1 at some width, from the text's encoding to the image."""

    model_channels: int
    """Of the UNet; 320 is the real one."""
    decoder_channels: int
    """Of the first stage; 128 is the real one."""
    batch: int
    size: int
    """Height and width of the latents."""
    steps: int
    """DDIM steps."""
    guided: bool


CASES = {
    "full-1": Case(320, 128, 1, 64, steps=2, guided=False),
    **{f"reduced-{b}": Case(64, 32, b, 32, steps=4, guided=False) for b in (1, 4, 16)},
    **{f"guided-{b}": Case(320, 128, b, 64, steps=50, guided=True) for b in (1, 4, 8, 16)},
    "tiny-2": Case(32, 32, 2, 8, steps=2, guided=True),  # to try the script
}
DEFAULT = {
    "cpu": ("full-1", "reduced-1", "reduced-4", "reduced-16"),
    "gpu": ("guided-1", "guided-4", "guided-8", "guided-16"),
}


def attention_shapes(name: str) -> dict[str, tuple[int, int, int, int, int]]:
    """{where: (batch, queries, keys, heads, width of a head)} of the attention in a case."""
    case = CASES[name]
    rows, found = case.batch * (2 if case.guided else 1), {}
    for level, mult in enumerate((1, 2, 4, 4)):
        tokens, width = (case.size >> level) ** 2, case.model_channels * mult // 8
        where = f"{name}, {tokens} tokens"
        found[where] = rows, tokens, tokens, 8, width
        found[f"{where}, text"] = rows, tokens, CONTEXT[0], 8, width
    found[f"{name}, decoder"] = case.batch, case.size**2, case.size**2, 1, case.decoder_channels * 4
    return found


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process is asked to do."""

    case: str
    """Name in CASES, or OPERATIONS."""
    attention_of: tuple[str, ...]
    """Cases whose attention OPERATIONS times."""
    weights: str
    """Folder of diffusers with `unet` and `vae` at the widths of the case."""
    variant: str
    """A setting of that side; see `sampling.SIDES`."""
    seconds: float
    """Timed runs go on for so long, and for `sides.LEAST_RUNS` at least."""
    threads: int
    dtype: str
    platform: str
    split: bool
    """Also measure the time by kind of operation."""
    cache: str
    """Folder of compiled programs, so that a round does not compile what another one did."""


def inputs(case: Case) -> dict[str, np.ndarray]:
    """x_T [B, h, w, 4], context and null [B, 77, 768]: what the text encoder gives for a prompt."""
    x_T = np.random.default_rng(0).standard_normal(
        (case.batch, case.size, case.size, 4), dtype=np.float32
    )
    rows = (case.batch, *CONTEXT)
    return {
        "x_T": x_T,
        "context": unet_cases.draw("context", rows, 1.7),
        "null": unet_cases.draw("null", rows, 1.7),
    }


def matrix_side(platform: str) -> int:
    """Side of the square matrices whose product stands for the machine's peak."""
    return 8192 if platform == "gpu" else 3072


def parts(
    job: Job,
    case: Case,
    steps: Callable[[], object],
    decode: Callable[[object], object],
) -> tuple[dict, object]:
    """({"steps", "decode", "peak_gib"}, image of the first run); both functions wait.

    The first runs, which may compile, are kept apart from the timed ones.
    """
    figures = {}
    figures["steps"], latents = sides.measure(steps, job.seconds)
    latent = latents[0]
    del latents
    figures["decode"], images = sides.measure(lambda: decode(latent), job.seconds)
    image = images[0]
    del images
    forget_peak()
    decode(steps())
    figures["peak_gib"] = peak_gib()
    return figures, image


def forget_peak() -> None:
    """Sets the largest resident memory of this process back to what it is now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    """Largest resident memory since then."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) / 2**20 for x in lines if x.startswith("VmHWM"))


def serve(
    run_case: Callable[[Job, Case], tuple[dict, np.ndarray]],
    run_operations: Callable[[Job], dict],
) -> None:
    """Does the job of this process; see `sides`. A case's array is its `image`."""
    job, out = sides.asked(Job)
    if job.case == OPERATIONS:
        sides.answer(out, run_operations(job), {})
    else:
        figures, image = run_case(job, CASES[job.case])
        sides.answer(out, figures, {"image": image})
