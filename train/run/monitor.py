"""Progress bar, metrics on disk and facts of the compiled step of a run."""

import collections
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath

from ldm_jax.cost import flops
from ldm_jax.runtime import rundir
from ldm_jax.runtime.log import LOG
from ldm_jax.train.run import goodput

# always steps/s: tqdm would switch to s/step for slow steps
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


def count_parameters(params: Any) -> int:
    """Number of scalars in a tree of arrays."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def compile_step(
    step: Any, *args: Any, model_step: Callable | None = None
) -> tuple[Callable, float]:
    """(`step` compiled ahead of the loop, operations of the model in one step); logs its cost.

    step: see `step.make_step`. model_step(): the same without remat and with plain
    attention, whose operations count where a peak is known to compare them with.
    """
    LOG.info("compiling the training step ...")
    start = time.perf_counter()
    traced = step.trace(*args)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - start
    if model_step is not None and goodput.peak(jax.devices()[0]):
        traced = model_step().trace(*args)
    work = flops.count(traced.jaxpr)
    memory = compiled.memory_analysis()
    parts = [f"compiled in {seconds:.1f} s", f"{work / 1e9:.2f} GFLOP per step"]
    if memory is not None:
        held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        parts.append(f"{held / 2**20:.0f} MiB per device")
    LOG.info(", ".join(parts))
    return lambda *rest: compiled(step.frozen, *rest), work


def summary_writer() -> type:
    """tensorboardX's writer, without torch: it would import that where it is installed, for nothing
    here, in two seconds."""
    unknown = "torch" not in sys.modules
    if unknown:
        sys.modules["torch"] = None  # to an import: not installed
    try:
        from tensorboardX import SummaryWriter
    finally:
        if unknown:
            sys.modules.pop("torch", None)
    return SummaryWriter


class Monitor:
    """Progress bar, JSONL parts and TensorBoard of one run; only process 0 writes.

    Metrics are fetched one step late, so that the host never waits for the device.
    """

    def __init__(
        self,
        workdir: epath.Path,
        first_step: int,
        steps: int,
        batch_size: int,
        clock: goodput.Clock | None = None,
        work: float = 0.0,
    ) -> None:
        """clock: gives the goodput; work: operations of the model in one step."""
        self.workdir, self.batch_size = workdir, batch_size
        self.clock, self.work, self.peak = clock, work, goodput.peak(jax.devices()[0])
        self.main = jax.process_index() == 0
        self.pending: collections.deque[tuple[int, Any]] = collections.deque()
        self.lines: list[dict] = []
        self.last_time, self.last_step = time.perf_counter(), first_step
        self.board = None
        # a slow import: now rather than between two steps
        self.board_type = summary_writer() if self.main else None
        self.bad_steps = self.skipped_steps = 0
        """Steps in a row without a finite loss, as of the last metrics fetched."""
        self.fetched_step = first_step
        terminal = sys.stderr.isatty()
        self.bar = tqdm.tqdm(
            total=steps,
            initial=first_step,
            unit="step",
            bar_format=BAR,
            disable=not self.main,
            dynamic_ncols=terminal,
            ncols=None if terminal else 120,
            mininterval=0.5 if terminal else 15.0,
            smoothing=0.1,
        )

    def step(self, step: int, metrics: dict, bad_records: int, log: bool) -> None:
        """After step number `step` (1 is the first): `metrics` are still on the device."""
        self.bar.update(1)
        if log:
            self.pending.append((step, {**metrics, "bad_records": bad_records}))
        while len(self.pending) > 1:
            self._fetch()

    def catch_up(self) -> None:
        """Fetch pending metrics; called where the host waits for the device anyway."""
        while self.pending:
            self._fetch()

    def flush(self) -> None:
        """Wait for pending metrics and write the lines so far as one numbered part."""
        self.catch_up()
        if self.lines and self.main:
            rundir.write_metrics(self.workdir, self.lines)
        self.lines = []

    def close(self) -> None:
        """Flushes and ends the bar."""
        self.flush()
        self.bar.close()
        if self.board is not None:
            self.board.close()

    def write(self, step: int, values: dict[str, float], *, aloud: bool = False) -> None:
        """A line of metrics at `step`, to JSONL and TensorBoard, and `aloud` to the terminal."""
        if aloud:
            LOG.info(f"step {step}: " + ", ".join(f"{n} {v:.4f}" for n, v in values.items()))
            self.pause()
        self.lines.append({"step": step, **values})
        if self.main:
            self._to_board(step, values)

    def _to_board(self, step: int, values: dict[str, float]) -> None:
        # on a full disk the writer's thread dies; once its queue is full, adding would block for
        # ever
        if self.board is not None and not self.board.file_writer.event_writer._worker.is_alive():
            self.board = None
            LOG.info("TensorBoard's file could not be written: another is begun")
        if self.board is None:
            try:
                self.board = self.board_type(str(self.workdir / "tensorboard"), max_queue=1000)
            except OSError:
                return  # writing metrics/ reports the fault of the disk
        for name, value in values.items():
            if math.isfinite(value):  # tensorboardX prints a warning for each other value
                self.board.add_scalar(name, value, step)

    def pause(self) -> None:
        """Time until now does not count as time per step (after an evaluation or a compilation)."""
        self.last_time = time.perf_counter()
        self.last_step = self.bar.n

    def _fetch(self) -> None:
        step, metrics = self.pending.popleft()
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.bad_steps, self.fetched_step = int(values["bad_steps"]), step
        skipped = int(values.get("skipped_steps", 0))
        if skipped > self.skipped_steps:
            LOG.info(f"step {step}: {skipped - self.skipped_steps} skipped, {skipped} in all")
        self.skipped_steps = skipped
        now = time.perf_counter()
        if step > self.last_step:
            rate = (step - self.last_step) / (now - self.last_time)
            values["steps_per_s"] = rate
            values["images_per_s_per_device"] = rate * self.batch_size / jax.device_count()
            if self.work:
                per_device = rate * self.work / jax.device_count()
                values["tflop_per_s_per_device"] = per_device / 1e12
                if self.peak:
                    values["mfu"] = per_device / self.peak
            self.last_time, self.last_step = now, step
        if self.clock is not None:
            values["goodput"] = self.clock.share()
        self.bar.set_postfix_str(_postfix(values), refresh=False)
        self.write(step, values)


def _postfix(values: dict[str, float]) -> str:
    """Text of the bar for the latest metrics, percentages as whole numbers."""
    shown = [f"loss {values['loss']:.4f}"]
    if "images_per_s_per_device" in values:
        shown.append(f"{values['images_per_s_per_device']:.1f} images/s/device")
    shown += [f"{name} {values[name]:.0%}" for name in ("mfu", "goodput") if name in values]
    return ", ".join(shown)
