"""Read every record of a data set once: `ldm-train check CONFIG --data.source.path IMAGES`.

What training would replace by the next record (see `ldm_jax.data.examples`) is found before it
starts, and named: a broken image, one too small, a caption that is not UTF-8, a map that does not
fit its image, a label out of range.
"""

import sys
from collections import Counter
from typing import Any, Literal, NamedTuple

import grain
import numpy as np
import tqdm

from ldm_jax import conditioning, data, schema
from ldm_jax.data import examples, transforms
from ldm_jax.runtime.log import LOG

SPLITS: tuple[Literal["train", "eval"], ...] = ("train", "eval")


class Fault(NamedTuple):
    """Why a record cannot be used."""

    kind: str
    """One of KINDS."""
    reason: str


KINDS = ("broken", "missing", "too small", "unfit")


class Reader:
    """Index -> the record's `Fault`, or None."""

    def __init__(
        self, source: data.Source, config: schema.DataConfig, train: bool, num_ids: int | None
    ) -> None:
        self._make, self._num_ids = examples.MakeExample(source, config, train), num_ids
        self._texts = "caption" in source.features

    def __call__(self, index: int) -> tuple[int, Fault | None]:
        return index, self._fault(index)

    def _fault(self, index: int) -> Fault | None:
        try:
            images, rest = self._make.usable(index)
            if self._num_ids is not None and "segmentation" in images:
                examples.check_ids(np.asarray(images["segmentation"]), self._num_ids)
            if self._texts:
                examples.caption_of(rest, None)
        except transforms.UndecodableError as error:
            return Fault("broken", str(error))
        except transforms.TooSmallError as error:
            return Fault("too small", str(error))
        except FileNotFoundError as error:
            return Fault("missing", str(error))
        except (ValueError, OSError) as error:
            return Fault("unfit", str(error))
        return None


def check(whole: schema.TrainConfig) -> int:
    """Log the faults of every record of both splits, and their numbers; 0 if there are none."""
    config, total = whole.data, 0
    cond = whole.cond if isinstance(whole, schema.LatentDiffusionTrainConfig) else None
    num_ids = conditioning.map_ids(cond)
    for split in SPLITS:
        source = data.open_source(config, split)
        faults = faults_of(source, config, split == "train", num_ids)
        counts = Counter(fault.kind for _, fault in faults)
        kinds = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind])
        LOG.info(
            f"{split}: {len(source)} records, {len(source) - len(faults)} can be used{_of(kinds)}"
        )
        total += len(faults)
        if len(faults) > config.max_bad_records:
            LOG.info(
                f"{split}: training would stop at {config.max_bad_records + 1} such records"
                f" (--data.max-bad-records {config.max_bad_records})"
            )
    return int(total > 0)


def _of(kinds: str) -> str:
    return f"; of the others: {kinds}" if kinds else ""


def faults_of(
    source: data.Source, config: schema.DataConfig, train: bool, num_ids: int | None = None
) -> list[tuple[int, Fault]]:
    """(index, fault) of every record that cannot be used, each logged as it is met."""
    options = grain.ReadOptions(num_threads=max(1, config.threads), prefetch_buffer_size=64)
    read: Any = grain.MapDataset.range(len(source)).map(Reader(source, config, train, num_ids))
    faults = []
    with tqdm.tqdm(total=len(source), unit="record", disable=not sys.stderr.isatty()) as bar:
        for index, fault in read.to_iter_dataset(options):
            bar.update()
            if fault is not None:
                faults.append((index, fault))
                LOG.info(f"{fault.kind}: {examples.name_of(source, index)}: {fault.reason}")
    return faults
