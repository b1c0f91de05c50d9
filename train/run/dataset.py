"""Facts of the data that a run keeps in data.json: names of the classes, numbers of records.

The model knows a class by its number alone, and a folder that is added or renamed shifts the
numbers of all that sort after it.
"""

from typing import NamedTuple

from etils import epath

from ldm_jax import data
from ldm_jax.runtime import rundir
from ldm_jax.runtime.log import LOG

SHOWN = 20
"""Largest number of classes in a line of the log."""


class Dataset(NamedTuple):
    """Content of data.json; `classes` is None if the data have no names."""

    classes: tuple[str, ...] | None
    records: dict[str, int]


def check(
    workdir: epath.PathLike, stream: data.Stream, held_out: data.Stream, *, labels: bool
) -> Dataset:
    """The facts that the run is to keep. Only reads.

    labels: the model is conditioned on classes. ValueError, with the difference, if it is and the
    run at `workdir` was trained on other classes.
    """
    classes = stream.source.classes
    records = {"train": stream.num_records, "eval": held_out.num_records}
    known = rundir.read_data(workdir)
    before = None if known is None else known["classes"]
    if labels and before is not None and classes is not None and (*before,) != classes:
        raise ValueError(
            f"{workdir}: was trained on other classes: {difference(before, classes)}. Bring the"
            " data back to the run's classes (its data.json), or use another --workdir"
        )
    if before is not None and (labels or classes is None):  # data may lie in a cache without names
        classes = (*before,)
    return Dataset(classes, records)


def difference(before: tuple[str, ...], now: tuple[str, ...]) -> str:
    """Description of a change: classes added and missing, and the first id of another class."""
    added = [name for name in now if name not in before]
    gone = [name for name in before if name not in now]
    parts = [
        f"{what} {', '.join(map(repr, names[:8]))}{' and others' if len(names) > 8 else ''}"
        for what, names in (("added", added), ("missing", gone))
        if names
    ]
    for i, (old, new) in enumerate(zip(before, now)):
        if old != new:
            parts.append(f"id {i} was {old!r} and would be {new!r}")
            break
    return "; ".join(parts)


def keep(run: epath.Path, dataset: Dataset, *, resumed: bool) -> None:
    """Write data.json, and log the classes and the changes since the last start.

    resumed: the run has trained before.
    """
    known = rundir.read_data(run)
    if known is None and resumed and dataset.classes is not None:
        LOG.info(
            "an older version began this run and kept no names of its classes: it keeps them from"
            " now on, as the data have them today"
        )
    for split, count in dataset.records.items():
        before = (known or {}).get("records", {}).get(split, count)
        if resumed and before != count:
            LOG.info(
                f"changed on resume: {split} records {before} -> {count}; which are drawn when, and"
                " which are held out, changes with it"
            )
    rundir.write_data(run, dataset._asdict())
    if dataset.classes is not None:
        LOG.info(table(dataset.classes))


def table(classes: tuple[str, ...]) -> str:
    """`classes: 0 cat, 1 dog`, cut after the first `SHOWN`."""
    shown = ", ".join(f"{i} {name}" for i, name in enumerate(classes[:SHOWN]))
    more = f" and {len(classes) - SHOWN} more, in data.json" if len(classes) > SHOWN else ""
    return f"classes: {shown}{more}"
