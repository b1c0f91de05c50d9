"""What both sides of `unet_vs_diffusers.py` share: cases, equal numbers for both, the stopwatch."""

import dataclasses
import json
import math
import os
import resource
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

CONTEXT = (77, 768)  # tokens of a prompt, width of a token
LEARNING_RATE = 1e-4  # everything else of AdamW: torch's defaults, which are ours
KINDS = ("convolution", "dense", "attention", "norms", "elementwise", "copies", "AdamW", "rest")
LEAST_RUNS = 3


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
    """Timed runs of a case go on for so long, and for LEAST_RUNS at least."""
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


def measure(run: Callable[[], object], seconds: float) -> tuple[dict, list]:
    """({"first", "runs"} in seconds, what each run returned); `run` waits for its result."""
    values, runs = [], []
    while len(runs) <= LEAST_RUNS or sum(runs[1:]) < seconds:
        value, took = timed(run)
        values.append(value)
        runs.append(took)
    return {"first": runs[0], "runs": runs[1:]}, values


def timed(function: Callable[[], object]) -> tuple[object, float]:
    """(what `function` returns, seconds)."""
    start = time.perf_counter()
    value = function()
    return value, time.perf_counter() - start


def serve(run_case: Callable[[Job, Case], tuple[dict, np.ndarray | None]]) -> None:
    """Does the job that the command line names, `JOB.json OUT`; writes OUT/figures.json and arrays.

    `run_case` returns the figures of a case, and the output of a forward pass.
    """
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    out = Path(sys.argv[2])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
    figures = {}
    for name in job.cases:
        figures[name], output = run_case(job, CASES[name])
        if output is not None:
            np.save(out / f"{name}.npy", output)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    (out / "figures.json").write_text(json.dumps({"cases": figures, "peak_gib": peak}))
