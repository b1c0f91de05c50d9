"""A side of `paired.py`: its job in a process of its own, the stopwatch, figures read back."""

import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import numpy as np

LEAST_RUNS = 3


@dataclasses.dataclass(frozen=True)
class Job:
    """The work of one process."""

    case: str
    variant: str
    """A setting of the side; see `cases.SIDES`."""
    seconds: float
    """Timed runs go on for so long, and for a least number of runs."""
    threads: int
    dtype: str
    platform: str
    split: bool
    """Also measure where the time goes."""
    kept: str
    """Folder of weights, caches and compiled programs."""
    prepare: bool = False
    """Write the weights of the case instead."""


def weights(job: Job) -> Path:
    """The folder with the weights of a case; those of a UNet's width share it."""
    width = getattr(cases.CASES[job.case], "model_channels", None)
    return Path(job.kept) / (f"stable_diffusion_{width}" if width else job.case)


def run(script: str, job: Job, **environment: str) -> tuple[dict, np.ndarray | None]:
    """(figures, the numbers that sides are compared by) of `script`, with the load in the figures.

    CalledProcessError if it fails; its output goes to the terminal.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), **environment}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / "job.json").write_text(json.dumps(dataclasses.asdict(job)))
        load = os.getloadavg()[0]
        command = [sys.executable, str(Path(__file__).parent / script), folder]
        subprocess.run(command, check=True, env=environment)
        figures = json.loads((out / "figures.json").read_text())
        numbers = np.load(out / "numbers.npy") if (out / "numbers.npy").exists() else None
    return {**figures, "load": [load, os.getloadavg()[0]]}, numbers


def serve(times: dict[type, Callable], prepares: dict[type, Callable]) -> None:
    """Do the job in the folder that the command line names, on as many cores as it says.

    `times[kind](job, case)` returns (figures, numbers or None); figures are {"parts": {part: as of
    `measure`}} and may hold their own "peak_gib".
    """
    out = Path(sys.argv[1])
    job = Job(**json.loads((out / "job.json").read_text()))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
    case, figures, numbers = cases.CASES[job.case], {}, None
    if job.prepare:
        prepares[type(case)](job, case)
    else:
        figures, numbers = times[type(case)](job, case)
    if numbers is not None:
        np.save(out / "numbers.npy", numbers)
    (out / "figures.json").write_text(json.dumps({"peak_gib": peak_gib(), **figures}))


def measure(
    function: Callable[[], Any], seconds: float, least: int = LEAST_RUNS
) -> tuple[dict, list]:
    """({"first", "n", "median", "least"}, the first results); `function` waits for its result.

    The first run may compile and is kept apart; the others go on for `seconds`, `least` at least.
    """
    values, runs, total = [], [], 0.0
    while len(runs) <= least or total < seconds:
        value, took = timed(function)
        total += took if runs else 0.0
        runs.append(took)
        values += [value] if len(values) < cases.COMPARED else []
        del value
    first, *runs = runs
    figures = {"n": len(runs), "median": statistics.median(runs), "least": min(runs)}
    return {"first": first, **figures}, values


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """(its result, seconds)."""
    start = time.perf_counter()
    value = function()
    return value, time.perf_counter() - start


def forget_peak() -> None:
    """Set the peak of this process's memory back to its present memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    """The largest resident memory since then, or since the start."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) / 2**20 for x in lines if x.startswith("VmHWM"))


def measure_sampling(
    job: Job, steps: Callable[[], Any], decode: Callable[[Any], Any]
) -> tuple[dict, Any, Any]:
    """(figures, latent, image) of the first runs; both functions wait."""
    parts = {}
    parts["steps"], (latent, *_) = measure(steps, job.seconds)
    parts["decode"], (image, *_) = measure(lambda: decode(latent), job.seconds)
    forget_peak()
    decode(steps())
    return {"parts": parts, "peak_gib": peak_gib()}, latent, image


def measure_operations(
    job: Job, case: cases.Operations, put: Callable, attend: Callable, product: Callable
) -> dict:
    """Figures of `attend(times, q, k, v)` and `product(a, a)`, which wait, on arrays of `put`."""
    parts = {}
    for where, qkv in cases.attention_inputs(case):
        given = [put(x) for x in qkv]
        for name, times in (("one", 1), ("row", cases.IN_A_ROW)):
            run = functools.partial(attend, times, *given)
            parts[f"{where}/{name}"], _ = measure(run, job.seconds / 4)
    a = put(cases.draw("a", (case.matrix, case.matrix)))
    parts["product"], _ = measure(lambda: product(a, a), job.seconds)
    parts["product"]["flops"] = 2.0 * case.matrix**3
    return {"parts": parts}
