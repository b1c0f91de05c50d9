"""Packs a folder of images: `ldm-train pack CONFIG --workdir PACKED --data.source.path IMAGES`.

One file per image is slow to read from network storage; ArrayRecord files of a few thousand are
fast. Images stay encoded as they are. `ldm_jax.data.packed` reads the result.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import jax
from etils import epath

from ldm_jax import schema
from ldm_jax.data import cache, examples, packed, transforms
from ldm_jax.data.folder import FolderSource
from ldm_jax.runtime import checkpoint, processes, progress, reading, rundir
from ldm_jax.runtime.log import LOG
from ldm_jax.train.prepare import shards

SPLITS = ("train", "eval")


def pack(config: schema.DataConfig, workdir: epath.PathLike, per_shard: int = 4096) -> int:
    """Packs both splits into the folder `workdir`, going on where it stopped; an exit code.

    Every process writes its own shards, and waits for the others at the end. An image that cannot
    be decoded is left out, named and counted: RuntimeError for more than `config.max_bad_records`
    of them.
    """
    if not isinstance(config.source, schema.FolderConfig):
        kind = type(config.source).__name__.removesuffix("Config").lower()
        raise ValueError(
            f"pack takes images in a folder, and data.source is {kind}: use a config like `folder`"
        )
    path = checkpoint.absolute(workdir)
    if packed.is_packed(config.source.path):
        raise ValueError(f"--data.source.path {config.source.path}: is packed already")
    sources = {split: FolderSource(config.source, split) for split in SPLITS}
    meta = describe(config, sources, per_shard)
    open_folder(path, meta)

    every = [(s, shard) for s in SPLITS for shard in cache.shards(s, len(sources[s]), per_shard)]
    # every so-manieth, not a block: the last shards, of `eval`, would all fall to one process
    mine = every[jax.process_index() :: jax.process_count()]
    due = shards.find_due(path, sources, mine, "images to pack", needs_summary=True)
    shards.begin_again(path / "pack.json", due, _json(meta))
    total = sum(one.shard.last - one.shard.first for one in due)
    began, bad = time.perf_counter(), 0
    hidden = not progress.is_watched()
    with progress.Bar(total, unit="image", does="packing", hidden=hidden) as bar:
        for one in due:
            left_out: list[list[str]] = []
            read = Reader(config, sources[one.split], one.split)
            records = records_of(read, one.shard, left_out, bad)
            for _ in cache.write_shard(path / one.shard.name, records):
                bar.update()
            bad += len(left_out)
            write_summary(path, one, left_out)
    if total:
        LOG.info(f"{total} images in {time.perf_counter() - began:.1f} s")
    processes.barrier("packed")
    finish(path, meta, every)
    return 0


def describe(
    config: schema.DataConfig, sources: dict[str, FolderSource], per_shard: int
) -> dict[str, Any]:
    """pack.json of a folder that is to be packed."""
    classes = sources["train"].classes
    return {
        "format": packed.FORMAT,
        "complete": False,
        "source": dataclasses.asdict(config.source),
        "classes": classes if classes is None else list(classes),
        "channels": config.channels,
        "splits": {
            split: {
                "images": len(source),
                "shards": len(cache.shards(split, len(source), per_shard)),
                "features": sorted(source.features),
            }
            for split, source in sources.items()
        },
    }


def open_folder(path: epath.Path, meta: dict[str, Any]) -> None:
    """Start a packed folder, or continue one of the same images.

    ValueError if the folder holds something else; OSError if it cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is a file; --workdir takes a directory")
    known = packed.peek(path)
    if known is not None:
        for name in ("source", "classes", "channels"):
            if known[name] != meta[name]:
                raise ValueError(
                    f"{path}: was started with {name} {known[name]}, now it is {meta[name]};"
                    " repeat the former command, or pack into another folder"
                )
        for split, now in meta["splits"].items():
            before = {name: known["splits"][split][name] for name in now}
            if before != now:
                raise ValueError(
                    f"{path}: was started with {before} of {split}, now it is {now}; the images"
                    " have changed, or --records-per-shard: pack into another folder"
                )
    elif path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
        raise ValueError(f"{path}: holds something else than packed images; give a new folder")
    processes.barrier("pack_looked")
    try:
        if jax.process_index() == 0:
            path.mkdir(parents=True, exist_ok=True)
            cache.drop_drafts(path)
        if known is None:
            rundir.write_text(path / "pack.json", _json(meta))
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path}: cannot be written ({reason}); choose another --workdir") from error
    processes.barrier("pack_opened")


class Read(NamedTuple):
    """A record, or the reason why there is none."""

    record: dict[str, Any]
    reason: str | None


class Reader:
    """Index -> `Read`, of one split."""

    def __init__(self, config: schema.DataConfig, source: FolderSource, split: str) -> None:
        self.config, self.source = config, source
        root = config.source.eval_path if split == "eval" else None
        self._root = (root or config.source.path).rstrip("/") + "/"

    def __call__(self, index: int) -> Read:
        file = self.source.describe(index).removeprefix(self._root)
        try:
            record = examples.read(self.source, index)
            # only to find what cannot be decoded, before training: the bytes stay as they are
            transforms.decode(record, self.config.channels)
        except ValueError as error:
            return Read({"file": file}, str(error))
        return Read({**record, "file": file}, None)


def records_of(
    read: Reader, shard: cache.Shard, left_out: list[list[str]], before: int
) -> Iterator[dict[str, Any]]:
    """The records of a shard, in order, read ahead; `left_out` collects [file, reason] of others.

    before: images that were left out of other shards. RuntimeError if they are too many.
    """
    ahead = grain.ReadOptions(num_threads=max(1, read.config.threads), prefetch_buffer_size=64)
    encoded = grain.MapDataset.range(shard.first, shard.last).map(read).to_iter_dataset(ahead)
    for one in encoded:
        if one.reason is None:
            yield one.record
            continue
        name = one.record["file"]
        left_out.append([name, one.reason])
        LOG.info(f"{name}: cannot be used ({one.reason}); left out")
        examples.check_limit(before + len(left_out), f"{name} ({one.reason})", read.config)


def write_summary(path: epath.Path, due: shards.Due, left_out: list[list[str]]) -> None:
    """Write the summary of a complete shard, in the process that wrote it."""
    count = due.shard.last - due.shard.first - len(left_out)
    shards.write(path, due, records=count, left_out=left_out)


def finish(path: epath.Path, meta: dict[str, Any], every: list[tuple[str, cache.Shard]]) -> None:
    """Process 0 writes pack.json and left_out.txt from the summaries. ValueError for no image."""
    counts, names = dict.fromkeys(SPLITS, 0), []
    for split, shard in every:
        summary = reading.read_object(shards.summary_path(path, shard), "remove it and pack again")
        counts[split] += summary["records"]
        names += [f"{split}\t{file}\t{reason}\n" for file, reason in summary["left_out"]]
    empty = [split for split, count in counts.items() if not count]
    if empty:
        raise ValueError(f"{path}: not one image of {empty[0]} can be used: see left_out")
    splits = {s: {**x, "records": counts[s]} for s, x in meta["splits"].items()}
    rundir.write_text(path / "left_out.txt", "".join(names))
    rundir.write_text(path / "pack.json", _json({**meta, "complete": True, "splits": splits}))
    LOG.info(
        f"{path}: {counts['train']} images to train and {counts['eval']} held out"
        + (f"; {len(names)} left out, in left_out.txt" if names else "")
        + f"; read them with --data.source.path {path}"
    )


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"
