"""Shards of `ldm-train encode` and `pack`: which are still to write, and a record of whole ones.

FOLDER/train-00000-of-00003.json    {"stamp": `data.stamp` of the shard's records, ...}
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from ldm_jax import data, schema
from ldm_jax.data import cache
from ldm_jax.runtime import reading, storage
from ldm_jax.runtime.log import LOG


class Due(NamedTuple):
    """A shard to write."""

    split: str
    shard: cache.Shard
    stamp: str
    """`data.stamp` of its records as they are now."""


def find_due(
    path: epath.Path,
    sources: Mapping[str, data.Source],
    shards: Sequence[tuple[str, cache.Shard]],
    what: str,
    *,
    needs_summary: bool,
) -> list[Due]:
    """Shards that are missing, or whose records have changed; logs their number.

    A changed shard is removed, so that it stays due until it is written again. A shard of an older
    version has no stamp: it is taken as it is, and compared from now on.
    needs_summary: a shard without a summary is due.
    """
    due, changed, older = [], 0, 0
    for split, shard in shards:
        one = Due(split, shard, data.stamp(sources[split], shard.first, shard.last))
        known = read(path, shard)
        if not (path / shard.name).exists() or (known is None and needs_summary):
            due.append(one)
        elif known is None or "stamp" not in known:
            older += 1
            write(path, one, **(known or {}))
        elif known["stamp"] != one.stamp:
            changed += 1
            (path / shard.name).unlink()
            summary_path(path, shard).unlink()
            due.append(one)
    total = sum(one.shard.last - one.shard.first for one in due)
    LOG.info(
        f"{len(shards) - len(due)} of {len(shards)} shards are there; {total} {what}"
        + (f"; files of {changed} shards have changed since they were written" if changed else "")
        + (f"; {older} shards of an older version are taken as they are" if older else "")
    )
    return due


def begin_again(file: epath.Path, due: Sequence[Due], text: str) -> None:
    """Mark the folder as incomplete in its own file, if shards are due."""
    if due:
        storage.write_whole(file, text.encode())


def summary_path(path: epath.Path, shard: cache.Shard) -> epath.Path:
    """Path of the file that marks a shard as whole."""
    return path / f"{epath.Path(shard.name).stem}.json"


def read(path: epath.Path, shard: cache.Shard) -> dict[str, Any] | None:
    """The summary of a shard, or None. ValueError if it is damaged."""
    file = summary_path(path, shard)
    if not file.exists():
        return None
    return reading.read_object(file, "remove it and run again")


def warn_of_changes(path: epath.PathLike, config: schema.DataConfig) -> None:
    """Warn of shards of a cache whose images, maps or captions have changed since.

    Where the folder that was encoded is at hand; process 0 looks at its files, not into them.
    """
    source = config.source
    if jax.process_index() != 0 or not isinstance(source, schema.FolderConfig):
        return
    folder, changed, total, resized = epath.Path(path), 0, 0, False
    for split, says in cache.read(path)["splits"].items():
        try:
            now = data.open_source(config, split)
        except (OSError, ValueError):
            return
        known = cache.shards(split, says["records"], -(-says["records"] // max(1, says["shards"])))
        total += len(known)
        for shard in known:
            stamp = (read(folder, shard) or {}).get("stamp")
            if len(now) != says["records"]:
                changed, resized = changed + 1, True
            elif stamp is not None:  # older versions kept none
                changed += stamp != data.stamp(now, shard.first, shard.last)
    if changed:
        again = "into another folder" if resized else "once more makes those shards again"
        LOG.warning(
            f"warning: {changed} of {total} shards of {path} were encoded from files that have"
            f" changed since, in {source.path}: this run trains on them as they were; `ldm-train"
            f" encode` {again}"
        )


def write(path: epath.Path, due: Due, **values: Any) -> None:
    """Write the summary of a whole shard; every process does so for its own shards."""
    text = json.dumps({"stamp": due.stamp, **values}, indent=2) + "\n"
    storage.write_whole(summary_path(path, due.shard), text.encode())
