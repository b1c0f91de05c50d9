"""A folder of images in sharded ArrayRecord files, as `ldm-train pack` writes it.

    PACKED/pack.json                            format, the folder's config, splits, classes
    PACKED/train-00000-of-00003.array_record    records, as `FolderSource` gives them, in its order
    PACKED/train-00000-of-00003.json            its number of records, and the files left out
    PACKED/left_out.txt                         these files, with the reason

It takes the place of the folder: `data.source.path` names one or the other.
"""

import json
from typing import Any, Literal

from etils import epath

from ldm_jax import schema
from ldm_jax.data import cache
from ldm_jax.data.folder import file_stamp
from ldm_jax.runtime import reading

FORMAT = 1  # of pack.json; a reader refuses a newer one
KEPT = ("class_from_folder", "captions", "segmentation_suffix", "mask_suffix")
"""Fields of a folder's config that determine the content of its records."""


class PackedSource:
    """One split of a packed folder; see `sources.Source`."""

    def __init__(self, config: schema.FolderConfig, split: Literal["train", "eval"]):
        self._path, meta = config.path, read(config.path)
        refuse_other(config, meta)
        summary = meta["splits"][split]
        self.features = frozenset(summary["features"])
        self.classes = None if meta["classes"] is None else tuple(meta["classes"])
        self.num_classes = None if self.classes is None else len(self.classes)
        self._split, self._shards = split, summary["shards"]
        self._records = cache.Shards(config.path, split, summary["shards"], "ldm-train pack")
        if len(self._records) != summary["records"]:
            raise ValueError(
                f"{config.path}: the shards of {split} hold {len(self._records)} records, but"
                f" pack.json says {summary['records']}; pack the images again"
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        if "image" not in record:
            raise ValueError("holds no image; pack the images again")
        return {name: value for name, value in record.items() if name != "file"}

    def stamp(self, first: int, last: int) -> str:
        """See `sources.Source`; covers all shards, because packing one again moves the records."""
        names = cache.shard_names(self._split, self._shards)
        return json.dumps([[n, *file_stamp(f"{self._path}/{n}")] for n in names])

    def describe(self, index: int) -> str:
        """Packed folder, number, and the path that the image had."""
        file = self._records[index].get("file", "of no known file")
        return f"{self._path} {self._split} record {index} ({file})"


def is_packed(path: epath.PathLike) -> bool:
    """True if `ldm-train pack` was started there."""
    return bool(path) and (epath.Path(path) / "pack.json").exists()


def read(path: epath.PathLike) -> dict[str, Any]:
    """pack.json of a completely packed folder. ValueError if it is damaged, unfinished or newer."""
    values = peek(path)
    if values is None:
        raise ValueError(f"{path}: is no packed folder (no pack.json); make one: ldm-train pack")
    if not values["complete"]:
        raise ValueError(f"{path}: packing has not finished; run the same `ldm-train pack` again")
    return values


def peek(path: epath.PathLike) -> dict[str, Any] | None:
    """pack.json, complete or not; None without one. ValueError if it is damaged or newer."""
    file = epath.Path(path) / "pack.json"
    if not file.exists():
        return None
    with reading.refusals(file, "pack into another folder"):
        values = reading.read_object(file, "pack into another folder")
        reading.check_format(values["format"], FORMAT, str(file))
        _, _, splits = (values[name] for name in ("complete", "source", "splits"))
        cache.check_splits(splits)
    return values


def refuse_other(config: schema.FolderConfig, meta: dict[str, Any]) -> None:
    """ValueError if the config asks for records of another kind than those that were packed."""
    if config.eval_path is not None:
        raise ValueError(
            f"{config.path}: is packed, with its held-out images; leave out source.eval_path"
        )
    for name in KEPT:
        here, there = getattr(config, name), meta["source"][name]
        if here != there:
            raise ValueError(
                f"{config.path}: was packed with source.{name} {there!r}, and here it is {here!r}:"
                " make them the same, or pack the images again"
            )
