"""`--profile FIRST:END`: a trace of a few steps in RUN/profile, for `xprof` or TensorBoard.

    RUN/profile/plugins/profile/steps_000100_000105/process_0000.xplane.pb

Every process traces itself. The profiler writes local files only, which are then copied into the
run.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from ldm_jax.runtime.log import LOG


def window(value: str, steps: int) -> range | None:
    """The steps of `FIRST:END`, END left out; None for "". ValueError for anything else."""
    if not value:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", value)
    steps_of = range(int(match[1]), int(match[2])) if match else range(0)
    if not steps_of or steps_of.start >= steps:
        raise ValueError(
            f"--profile {value!r} is not FIRST:END with FIRST below END and below the {steps}"
            " steps of the run: 100:105 traces the five steps after the hundredth"
        )
    return steps_of


class Profile:
    """Traces the steps of a window that this start of the run makes."""

    def __init__(self, run: epath.Path, steps: range | None, first: int) -> None:
        self.run, self.steps = run, steps
        self.local: tempfile.TemporaryDirectory | None = None
        if steps is not None and first >= steps.stop:
            LOG.info(
                f"--profile {steps.start}:{steps.stop}: the run is at step {first} already;"
                " nothing is traced"
            )
            self.steps = None

    @contextlib.contextmanager
    def traced(self, i: int) -> Iterator[None]:
        """Trace the training step after `i` others if it lies in the window."""
        if self.steps is None or i not in self.steps:
            yield
            return
        if self.local is None:
            self.local = tempfile.TemporaryDirectory()
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call would slow what is measured
            jax.profiler.start_trace(self.local.name, profiler_options=options)
        with jax.profiler.StepTraceAnnotation("train", step_num=i):
            yield

    def ends(self, step: int) -> bool:
        """True if the window ends with `step` steps made."""
        return self.local is not None and step >= self.steps.stop

    def close(self) -> None:
        """End a trace under way, and keep its steps so far."""
        if self.local is None:
            return
        jax.profiler.stop_trace()
        name = f"steps_{self.steps.start:06d}_{self.steps.stop:06d}"
        folder = self.run / "profile" / "plugins" / "profile" / name
        folder.mkdir(parents=True, exist_ok=True)
        for path in Path(self.local.name).rglob("*.xplane.pb"):
            target = folder / f"process_{jax.process_index():04d}.xplane.pb"
            target.write_bytes(path.read_bytes())
        self.local.cleanup()
        self.local = self.steps = None
        LOG.info(f"trace of {name.replace('_', ' ')}: {self.run / 'profile'}")
