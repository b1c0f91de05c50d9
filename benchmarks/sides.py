"""A side of a paired benchmark: its work in a process of its own, the stopwatch, figures read back.

The parent hands a job (a dataclass with `threads`) to a script by `run`; that script takes it with
`asked` and answers with `answer`.
"""

import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LEAST_RUNS = 3


def run(script: str, job: Any, **environment: str) -> tuple[dict, dict[str, np.ndarray]]:
    """(figures, arrays by name) of `script` in this folder; the load before and after is in them.

    CalledProcessError if it fails; what it says goes to the terminal.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), **environment}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / "job.json").write_text(json.dumps(dataclasses.asdict(job)))
        load = os.getloadavg()[0]
        command = [sys.executable, str(Path(__file__).parent / script), str(out / "job.json")]
        subprocess.run([*command, folder], check=True, env=environment)
        figures = json.loads((out / "figures.json").read_text())
        arrays = {path.stem: np.load(path) for path in out.glob("*.npy")}
    return {**figures, "load": [load, os.getloadavg()[0]]}, arrays


def asked(kind: type) -> tuple[Any, Path]:
    """(the job that the command line names, `JOB.json OUT`; OUT), on as many cores as it says."""
    job = kind(**json.loads(Path(sys.argv[1]).read_text()))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
    return job, Path(sys.argv[2])


def answer(out: Path, figures: dict, arrays: dict[str, np.ndarray]) -> None:
    """Writes OUT/figures.json, and an array per name; adds the peak of memory to the figures."""
    for name, values in arrays.items():
        np.save(out / f"{name}.npy", values)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    (out / "figures.json").write_text(json.dumps({"peak_gib": peak, **figures}))


def measure(
    run: Callable[[], object], seconds: float, least: int = LEAST_RUNS
) -> tuple[dict, list]:
    """({"first", "runs"} in seconds, what each run returned); `run` waits for its result.

    The first may compile and is kept apart; of the others at least `least`, for so many seconds.
    """
    values, runs = [], []
    while len(runs) <= least or sum(runs[1:]) < seconds:
        value, took = timed(run)
        values.append(value)
        runs.append(took)
    return {"first": runs[0], "runs": runs[1:]}, values


def timed(function: Callable[[], object]) -> tuple[object, float]:
    """(what `function` returns, seconds)."""
    start = time.perf_counter()
    value = function()
    return value, time.perf_counter() - start
