"""What the sides of `first_stage.py` share: cases, and the job of a process."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sides
import unet_cases

OURS, TORCH = "ldm_jax", "torch"
IMAGES, CACHE = "from images", "from a cache"
WEIGHTS = "weights"
"""No side: asks the first one's script to write what all of them load."""
LEARNING_RATE = 1e-4  # of both Adams: their updates show in the losses of the next step
# Where a gradient is zero but for rounding, Adam divides rounding by itself. These are above it and
# below the other gradients: of a sum over an image, and of a mean.
EPSILON, DISC_EPSILON = 1e-2, 1e-6
COMPARED = 3  # steps whose losses are compared
TERMS = ("loss", "nll_loss", "g_loss", "d_weight", "disc_loss")


@dataclasses.dataclass(frozen=True)
class Model:
    """A KL first stage."""

    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    image_channels: int
    size: int
    """Side of an image in pixels."""


MODELS = {
    "demo": Model(32, (1, 2, 2), 1, 4, 1, 16),
    "reduced": Model(32, (1, 2, 4, 4), 2, 4, 3, 64),  # kl-f8 at a quarter of its width
    "kl-f4": Model(128, (1, 2, 4), 2, 3, 3, 256),
    "kl-f8": Model(128, (1, 2, 4, 4), 2, 4, 3, 256),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One timing, of `batch` images at once."""

    kind: str
    """"step": generator and discriminator; "encode": image to moments; "train": an LDM's step."""
    model: str
    batch: int


CASES = {
    **{f"step-reduced-{b}": Case("step", "reduced", b) for b in (1, 4)},
    "step-kl-f8-1": Case("step", "kl-f8", 1),
    **{f"encode-demo-{b}": Case("encode", "demo", b) for b in (64, 256)},
    **{f"encode-kl-f8-{b}": Case("encode", "kl-f8", b) for b in (1, 4)},
    "train-demo-64": Case("train", "demo", 64),
    **{f"train-ldm4-{b}": Case("train", "kl-f4", b) for b in (1, 2)},
}
# Name of a side: its script. The first of a kind is compared with the second.
SIDES = {
    "step": {OURS: "first_stage_jax.py", TORCH: "first_stage_torch.py"},
    "encode": {OURS: "first_stage_jax.py", TORCH: "first_stage_torch.py"},
    "train": {CACHE: "first_stage_latents.py", IMAGES: "first_stage_latents.py"},
}
PIECES = ("autoencoder", "LPIPS", "discriminator")


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process is asked to do."""

    case: str
    side: str
    seconds: float
    """Timed runs go on for so long, and for COMPARED - 1 at least."""
    threads: int
    pieces: bool
    """Also time the parts of a step, each as a program of its own."""
    kept: str
    """Folder of weights, caches and compiled programs."""


def weights_of(job: Job) -> Path:
    """The folder with the weights and noise of a case, as `first_stage_jax.py` writes it."""
    return Path(job.kept) / job.case


def images(case: Case) -> np.ndarray:
    """float32 [B, size, size, c] in [-1, 1], a function of the shape alone."""
    model = MODELS[case.model]
    return unet_cases.draw("image", (case.batch, model.size, model.size, model.image_channels))


def of_steps(values: list[list[float]]) -> list[list[float]]:
    """What is compared of the first steps' `TERMS`: all of the first step, then nll_loss.

    Rounding grows in the adversary: images changed by 1e-7 of themselves change the third step's
    adaptive weight by 4 % on one side alone.
    """
    nll = TERMS.index("nll_loss")
    return [values[0], *([step[nll]] for step in values[1:COMPARED])]


def median_of(run: Callable[[], object], count: int = 3) -> float:
    """Median seconds of `count` runs after one that does not count."""
    run()
    return sorted(sides.timed(run)[1] for _ in range(count))[count // 2]


def serve(
    run_case: Callable[[Job, Case], dict], write_weights: Callable[[Job], None] | None = None
) -> None:
    """Does the job of this process; see `sides`."""
    job, out = sides.asked(Job)
    if job.side == WEIGHTS:
        write_weights(job)
        sides.answer(out, {}, {})
    else:
        sides.answer(out, run_case(job, CASES[job.case]), {})
