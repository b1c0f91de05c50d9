"""Encoded data on disk: posterior moments and conditioning of every record, in ArrayRecord shards.

    CACHE/cache.json                        format, hash of the first stage, data config, shards
    CACHE/train-00000-of-00003.array_record (eval-... likewise)

Record i of a split is record i of its data source, encoded `views` times, so a stream over the
cache shuffles as one over the images does. Shards appear whole, under their final name.
"""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import grain
import numpy as np
from array_record.python import array_record_module
from etils import epath
from flax import serialization

from ldm_jax import schema
from ldm_jax.runtime import reading, storage
from ldm_jax.schema import serialize

FORMAT = 1  # of cache.json; a reader refuses a newer one
MOMENTS = ("mean", "logvar")
RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


class CacheSource:
    """One split of a cache as a data source; records hold arrays instead of encoded images.

    mean, logvar   float [views, flips, h, w, z]: moments of the posterior, unscaled; without logvar
                   a latent before quantization. flips is 2 (plain, mirrored) or 1
    label, caption, segmentation int [views, h, w], mask uint8 [views, h, w]: as the data have them
    """

    def __init__(self, path: str, split: Literal["train", "eval"]):
        self.path, meta = path, read(path)
        summary = meta["splits"][split]
        self.features = frozenset(summary["features"])
        self.num_classes = summary["num_classes"]
        self.classes = None if meta.get("classes") is None else tuple(meta["classes"])
        self.latent_shape = tuple(summary["shape"])
        self._records = Shards(path, split, summary["shards"], "ldm-train encode")
        if len(self._records) != summary["records"]:
            raise ValueError(
                f"{path}: the shards of {split} hold {len(self._records)} records, but cache.json"
                f" says {summary['records']}; remove them and run `ldm-train encode` again"
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._records[index]

    def describe(self, index: int) -> str:
        """Cache and number, for messages."""
        return f"record {index} of {self.path}"


def to_example(
    record: dict[str, Any], flip: bool, rng: np.random.Generator | None
) -> dict[str, np.ndarray]:
    """mean and logvar float32 [h, w, z], maps as from `transforms.to_arrays`.

    A random view, mirrored half of the time if `flip`; without `rng` the first, not mirrored.
    """
    views, flips = record["mean"].shape[:2]
    view = int(rng.integers(views)) if rng is not None and views > 1 else 0
    # after a single view this is the first draw, as it is after a centre crop
    mirrored = bool(flip and flips > 1 and rng is not None and rng.random() < 0.5)
    example = {
        name: record[name][view, int(mirrored)].astype(np.float32)
        for name in MOMENTS
        if name in record
    }
    turn = (lambda a: a[:, ::-1].copy()) if mirrored else (lambda a: a)
    if "segmentation" in record:
        example["segmentation"] = turn(record["segmentation"][view]).astype(np.int32)
    if "mask" in record:
        example["mask"] = turn(record["mask"][view]).astype(np.float32)[..., None]
    return example


# --- cache.json -----------------------------------------------------------------------------------


def read(path: epath.PathLike) -> dict[str, Any]:
    """cache.json of a complete cache. ValueError if it is none, damaged, incomplete or newer."""
    values = peek(path)
    if values is None:
        raise ValueError(f"{path}: is no latent cache (no cache.json); make one: ldm-train encode")
    if not values["complete"]:
        raise ValueError(
            f"{path}: encoding has not finished; run the same `ldm-train encode` again"
        )
    return values


def peek(path: epath.PathLike) -> dict[str, Any] | None:
    """cache.json, complete or not; None without one. ValueError if it is damaged or newer."""
    file = epath.Path(path) / "cache.json"
    if not file.exists():
        return None
    with reading.refusals(file, "encode into another folder"):
        values = reading.read_object(file, "encode into another folder")
        reading.check_format(values["format"], FORMAT, str(file))
        _, _, splits = values["complete"], values["first_stage"], values["splits"]
        check_splits(splits)
    return values


def check_splits(splits: Any) -> None:
    """ValueError or another of `reading.DAMAGE` unless the counts of each split are counts."""
    for split, says in splits.items():
        for name in ("records", "shards"):
            if name in says and (type(says[name]) is not int or says[name] < 0):
                raise ValueError(f"{name} of {split} are {says[name]!r:.40}, which is no count")


def check(path: epath.PathLike, data: schema.DataConfig, first_stage: str | None = None) -> None:
    """ValueError as from `read`, and if a cache is of other data or another first stage.

    first_stage: its hash as from `rundir.params_hash`; None is not compared.
    """
    refuse_other(path, read(path), data, first_stage)


def refuse_other(
    path: epath.PathLike, known: dict[str, Any], data: schema.DataConfig, first_stage: str | None
) -> None:
    """As `check`, on the result of `peek`."""
    if first_stage is not None and known["first_stage"] != first_stage:
        raise ValueError(
            f"{path}: was encoded with another first stage ({known['first_stage'][:16]}, not"
            f" {first_stage[:16]}); give that one, or encode into another folder"
        )
    before = serialize.from_dict(known["data"], f"{path}/cache.json")
    identity, _ = serialize.difference(before, data)
    if identity:
        raise ValueError(
            f"{path}: was made of other data: {'; '.join(identity)}. Use their config, or encode"
            " into another folder"
        )


# --- shards ---------------------------------------------------------------------------------------


def shard_names(split: str, count: int, number: int | None = None) -> list[str]:
    """File names of all `count` shards of a split, or of the first `number`."""
    number = count if number is None else number
    return [f"{split}-{i:05d}-of-{count:05d}.array_record" for i in range(number)]


class Shards:
    """Records of all shards of a split, by index.

    FileNotFoundError names the first shard that is missing, and the command that makes it;
    ValueError one that is damaged, a record that is, or storage that ArrayRecord cannot read.
    """

    def __init__(self, path: epath.PathLike, split: str, count: int, command: str):
        if "://" in str(path):
            raise ValueError(
                f"{path}: ArrayRecord files are read by index, from a file system only: mount the"
                " bucket (gcsfuse, mountpoint-s3) or copy the folder, and give its path there"
            )
        # at most one more than exist: a damaged index may claim billions of shards
        there = sum(1 for _ in epath.Path(path).glob(f"{split}-*.array_record"))
        names = shard_names(split, count, min(count, there + 1))
        paths = [str(epath.Path(path) / name) for name in names]
        missing = [p for p in paths if not epath.Path(p).exists()]
        if missing:
            raise FileNotFoundError(
                f"{missing[0]}: is missing; run `{command}` again, it makes the missing files"
            )
        self._name, self._command = f"{path}: record {{}} of {split}", command
        try:
            self._source = grain.sources.ArrayRecordDataSource(paths)
        except RuntimeError:
            for shard in paths:  # the error of all does not name the one
                self._open_alone(shard)
            raise

    def _open_alone(self, shard: str) -> None:
        try:
            grain.sources.ArrayRecordDataSource([shard])
        except RuntimeError as error:
            raise ValueError(
                f"{shard}: is damaged or cut off{_reason(error)}; remove it and run"
                f" `{self._command}` again, it makes the missing files"
            ) from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self._name.format(index)
        with reading.refusals(name, f"make its shard anew with `{self._command}`"):
            try:
                data = self._source[index]
            except RuntimeError as error:
                raise ValueError(f"is damaged{_reason(error)}") from error
            record = serialization.msgpack_restore(data)
            if not isinstance(record, dict):
                raise ValueError(f"is {type(record).__name__}, not names and values")
            return record


def _reason(error: RuntimeError) -> str:
    """Return ArrayRecord's message about a file, which may be empty."""
    return f" ({error})" if str(error) else ""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of a split that one process writes."""

    name: str
    first: int
    last: int
    """One past its last record."""


def shards(split: str, records: int, per_shard: int) -> list[Shard]:
    """All shards of a split, of all processes: nearly equal, at most `per_shard` records."""
    count = max(1, -(-records // per_shard))
    edges = [i * records // count for i in range(count + 1)]
    names = shard_names(split, count)
    return [Shard(*row) for row in zip(names, edges[:-1], edges[1:], strict=True)]


def write_shard(path: epath.Path, records: Iterable[dict[str, Any]]) -> Iterator[int]:
    """Write a shard, yielding the number of records written so far after each.

    The file takes its name when it is whole. OSError names the file that cannot be written.
    """
    remote = "://" in str(path)  # ArrayRecord writes to local files
    folder = epath.Path(tempfile.mkdtemp()) if remote else path.parent
    draft = folder / f".{path.name}.{os.getpid()}.part"
    count = 0
    try:
        with _named(path):
            writer = storage.retried(
                str(path),
                lambda: array_record_module.ArrayRecordWriter(str(draft), "group_size:1"),
            )
        for record in records:
            with _named(path):
                writer.write(serialization.msgpack_serialize(record))
            count += 1
            yield count
        with _named(path):
            writer.close()
            reader = array_record_module.ArrayRecordReader(str(draft), RANDOM_ACCESS)
            if reader.num_records() != count:
                raise OSError(f"{reader.num_records()} of {count} records can be read back")
            move = draft.copy if remote else draft.replace
            storage.retried(str(path), lambda: move(path))
    finally:
        if draft.exists():
            draft.unlink()
        if remote:
            folder.rmdir()


@contextlib.contextmanager
def _named(path: epath.Path) -> Iterator[None]:
    """Make errors of writing name the shard and the remedy."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord's own are RuntimeErrors
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"{path}: cannot be written ({reason}); make room or choose another --workdir, and run"
            " the same command again: shards that are whole are kept"
        ) from error


def drop_drafts(path: epath.Path) -> int:
    """Remove the drafts of interrupted writers; returns their number."""
    left = list(path.glob(".*.array_record.*.part"))
    for draft in left:
        draft.unlink()
    return len(left)
