"""Writers of a run's metrics and pictures: JSON lines, TensorBoard, Weights & Biases."""

import contextlib
import importlib
import importlib.util
import json
import math
import secrets
import sys
import threading
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from etils import epath

from ldm_jax import schema
from ldm_jax.runtime import reading, rundir
from ldm_jax.runtime.log import LOG
from ldm_jax.schema import serialize

LARGEST = 256  # records in a part of metrics
PACE = 1.0  # seconds at least between two writes of a part that grows


class Writer(Protocol):
    """Takes what is measured and drawn after a step."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """RUN/metrics: a part grows, and is written anew as a whole, in the background.

    An error there is nobody's to see: `flush` writes the same again, and raises it.
    """

    def __init__(self, run: epath.Path) -> None:
        self.run, self.records = run, []
        self.due, self.closed = threading.Event(), threading.Event()
        self.writing = threading.Lock()
        threading.Thread(target=self._write_on, daemon=True, name="metrics").start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a record, which is on the disk a moment later."""
        self.records.append({"step": step, **values})
        self.due.set()
        if len(self.records) >= LARGEST:
            self.flush()

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Leave it: a run keeps its pictures as files."""

    def flush(self) -> None:
        """Write what there is, here and now; the next record begins a new part."""
        with self.writing:
            rundir.write_metrics(self.run, self.records)
            self.records = []

    def close(self) -> None:
        """Flush, and end the thread."""
        self.closed.set()
        self.due.set()
        self.flush()

    def _write_on(self) -> None:
        while self.due.wait() and not self.closed.is_set():
            self.due.clear()
            with contextlib.suppress(Exception), self.writing:
                rundir.write_metrics(self.run, list(self.records))
            self.closed.wait(PACE)


class TensorBoard:
    """RUN/tensorboard."""

    def __init__(self, run: epath.Path) -> None:
        self.folder, self.board = str(run / "tensorboard"), None
        self.kind = summary_writer()  # here: not between two steps

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Draw points of curves."""
        if self._begin():
            for name, value in values.items():
                if math.isfinite(value):  # it warns of others, on lines of its own
                    self.board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Show uint8 [H, W, 3 or 1]."""
        if self._begin():
            self.board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Write what it still holds."""
        if self.board is not None:
            self.board.close()

    def _begin(self) -> bool:
        # on a full disk its thread dies, and what comes when its queue is full would wait for ever
        if self.board is not None and not self.board.file_writer.event_writer._worker.is_alive():
            self.board = None
            LOG.info("TensorBoard's file could not be written: another is begun")
        if self.board is None:
            with contextlib.suppress(OSError):  # metrics/ says what is wrong with the disk
                self.board = self.kind(self.folder, max_queue=1000)
        return self.board is not None


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


class Wandb:
    """A run of a Weights & Biases project; resumed, it goes on in the same one.

    RUN/wandb.json holds its id.
    """

    def __init__(self, run: epath.Path, config: schema.BaseTrainConfig) -> None:
        self.module = importlib.import_module("wandb")
        path = run / "wandb.json"
        if not path.exists():
            rundir.write_text(path, json.dumps({"id": secrets.token_hex(4)}) + "\n")
        self.run = self.module.init(
            project=config.wandb,
            name=run.name,
            id=reading.read_object(path, "remove it").get("id"),
            resume="allow",
            config=serialize.to_dict(config),
            dir=None if "://" in str(run) else str(run),
        )
        # its own steps only grow: those that a resumed run makes again would be left out
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log values, with their step."""
        self.run.log({"step": step, **values})

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Log uint8 [H, W, 3 or 1]."""
        shown = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
        self.run.log({"step": step, name: self.module.Image(shown)})

    def close(self) -> None:
        """End the upload."""
        self.run.finish()


def check(config: schema.BaseTrainConfig) -> None:
    """ValueError for --wandb where wandb is not installed; it is not imported."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"--wandb {config.wandb}: wandb is not installed; pip install wandb, or leave --wandb"
            " out: metrics and pictures are in the run and in its tensorboard/ anyway"
        )


def beside_metrics(run: epath.Path, config: schema.BaseTrainConfig) -> list[Writer]:
    """TensorBoard, and Weights & Biases where the config names a project."""
    return [TensorBoard(run), *([Wandb(run, config)] if config.wandb else [])]
