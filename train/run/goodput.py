"""Goodput: the share of a run's time that went into its training steps; and model FLOPs (MFU).

Time counts from the first start of the run, over all its starts. Lost for training are: starting,
restoring and compiling; evaluating, drawing and tracing; saving, as long as the loop waits for it;
waiting for data while the device is idle; steps after the last checkpoint of a start that died,
which are repeated; and the time from that checkpoint until the run goes on. Between an orderly stop
(SIGTERM, the last step) and the next start no time counts.

The times so far are saved in each checkpoint, so that they belong to its step, whichever checkpoint
is restored.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from ldm_jax.cost import tpu_cost

# Published dense bfloat16 operations per second by device; of the names that are part of
# `device_kind`, the longest counts.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": tpu_cost.CHIPS["v5e"].operations,
    "TPU v5e": tpu_cost.CHIPS["v5e"].operations,
    "TPU v5": tpu_cost.CHIPS["v5p"].operations,
    "TPU v5p": tpu_cost.CHIPS["v5p"].operations,
    "TPU v6 lite": tpu_cost.CHIPS["v6e"].operations,
    "TPU v6e": tpu_cost.CHIPS["v6e"].operations,
    "A100": 312e12,
    "H100": 989.4e12,
    "H100 PCIe": 756e12,
    "H200": 989.4e12,
}


def peak(device: jax.Device) -> float | None:
    """Peak operations per second of a device; None for an unknown one."""
    names = [name for name in PEAKS if name in device.device_kind]
    return PEAKS[max(names, key=len)] if names else None


class Clock:
    """Accounts for the time of one run; read by the loop, saved in checkpoints."""

    def __init__(self, started: float, kept: Mapping[str, Any] | None = None) -> None:
        """started: `time.time()` of this start; kept: `spent` of the checkpoint it goes on from."""
        kept = kept or {}
        self.trained = kept.get("trained_s", 0.0)
        self.before = kept.get("wall_s", 0.0)
        if kept and not kept["orderly"]:
            self.before += max(0.0, started - kept["time"])
        # a clock that is set back or forth while the run goes on changes nothing
        self.started = time.monotonic() - max(0.0, time.time() - started)
        self.lost = 0.0
        self.begun: float | None = None
        self.made: jax.Array | None = None
        """An output of the latest step: ready when the device is idle."""

    def begin(self) -> None:
        """The first step is about to be made."""
        self.begun = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count the time inside as lost for training; call it when the device has nothing to do."""
        start = time.monotonic()
        yield
        self.lost += time.monotonic() - start

    def batches(self, batches: Iterator) -> Iterator:
        """The same batches. A wait for one counts as lost if the device was idle when it came."""
        while True:
            start = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            if self.made is None or self.made.is_ready():
                self.lost += time.monotonic() - start
            yield batch

    def _now(self) -> tuple[float, float]:
        now = time.monotonic()
        loop = 0.0 if self.begun is None else now - self.begun - self.lost
        return self.trained + loop, self.before + now - self.started

    def share(self) -> float:
        """Goodput until now, in [0, 1]."""
        trained, wall = self._now()
        return trained / max(wall, 1e-9)

    def spent(self, orderly: bool) -> dict[str, Any]:
        """Times for the next start to continue; orderly: the run ends here on purpose."""
        trained, wall = self._now()
        times = {"trained_s": trained, "wall_s": wall, "time": time.time()}
        return {**{name: round(value, 3) for name, value in times.items()}, "orderly": orderly}
