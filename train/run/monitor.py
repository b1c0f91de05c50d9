"""Progress bar, metrics on disk and facts of the compiled step of a run."""

import collections
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ldm_jax.cost import flops
from ldm_jax.runtime import images, progress
from ldm_jax.runtime.log import LOG
from ldm_jax.train.run import goodput, writers


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


class Monitor:
    """Progress bar, metrics and pictures of one run; only process 0 writes.

    Metrics are fetched one step late, so that the host never waits for the device.
    """

    def __init__(
        self,
        workdir: epath.Path,
        first_step: int,
        steps: int,
        batch_size: int,
        clock: goodput.Clock | None = None,
        beside: Callable[[], Sequence[writers.Writer]] = tuple,
    ) -> None:
        """clock: what goodput is read from; beside(): writers beside that of RUN/metrics."""
        self.batch_size, self.work = batch_size, 0.0
        self.clock, self.peak = clock, goodput.peak(jax.devices()[0])
        main = jax.process_index() == 0
        self.pending: collections.deque[tuple[int, Any]] = collections.deque()
        self.last_time, self.last_step = time.perf_counter(), first_step
        self.metrics = writers.Metrics(workdir) if main else None
        self.writers = [self.metrics, *beside()] if main else []
        self.bad_steps = self.skipped_steps = 0
        """Steps in a row without a finite loss, as of the last metrics fetched."""
        self.fetched_step = first_step
        self.bar = progress.Bar(
            steps, unit="step", does="training", initial=first_step, hidden=not main
        )

    def step(self, step: int, metrics: dict, bad_records: int, log: bool) -> None:
        """After step number `step` (1 is the first): `metrics` are still on the device."""
        self.bar.update()
        if log:
            self.pending.append((step, {**metrics, "bad_records": bad_records}))
        # the newest stays: its step is still running, and to fetch it is to wait for it
        while len(self.pending) > 1:
            self._fetch()

    def catch_up(self) -> None:
        """Fetch pending metrics; called where the host waits for the device anyway."""
        while self.pending:
            self._fetch()

    def flush(self) -> None:
        """Wait for what is pending; then all metrics so far are on the disk."""
        self.catch_up()
        if self.metrics is not None:
            self.metrics.flush()

    def close(self) -> None:
        """Flush, and end the bar and the writers."""
        self.catch_up()
        self.bar.close()
        while self.writers:
            self.writers.pop(0).close()

    def abandon(self) -> None:
        """End bar and writers on the way out of an error, without waiting for the device."""
        self.bar.close()
        while self.writers:
            with contextlib.suppress(Exception):  # of the two errors the first one counts
                self.writers.pop(0).close()

    def write(self, step: int, values: dict[str, float], *, aloud: bool = False) -> None:
        """Write metrics of `step`, and `aloud` say them on the terminal."""
        if aloud:
            LOG.info(f"step {step}: " + ", ".join(f"{n} {v:.4f}" for n, v in values.items()))
            self.pause()
        for writer in self.writers:
            writer.scalars(step, values)

    def picture(self, step: int, path: epath.Path) -> None:
        """Show what was drawn after `step` where there is more than the run's own files."""
        beside = [writer for writer in self.writers if writer is not self.metrics]
        if beside:
            pixels = images.read_png(path)
            for writer in beside:
                writer.picture(step, path.parent.name, pixels)

    def pause(self) -> None:
        """Time until now does not count as time per step (after an evaluation or a compilation)."""
        self.last_time = time.perf_counter()
        self.last_step = self.bar.count

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
        self.bar.note(_postfix(values))
        self.write(step, values)


def _postfix(values: dict[str, float]) -> str:
    """Text of the bar for the latest metrics, percentages as whole numbers."""
    shown = [f"loss {values['loss']:.4f}"]
    if "images_per_s_per_device" in values:
        shown.append(f"{values['images_per_s_per_device']:.1f} images/s/device")
    shown += [f"{name} {values[name]:.0%}" for name in ("mfu", "goodput") if name in values]
    return ", ".join(shown)
