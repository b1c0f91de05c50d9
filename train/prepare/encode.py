"""Writes the latents of a data set once: `ldm-train encode CONFIG --workdir CACHE [...]`.

It writes moments of the posterior, not samples, so that training draws new samples at every step.
"""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ldm_jax import bundle, conditioning, data, schema, sharding
from ldm_jax.data import cache, examples
from ldm_jax.models import autoencoder
from ldm_jax.runtime import checkpoint, overlap, processes, progress, rundir
from ldm_jax.runtime.log import LOG
from ldm_jax.schema import serialize
from ldm_jax.train.frozen import first_stage
from ldm_jax.train.prepare import shards

SPLITS = ("train", "eval")


def encode(config: schema.LatentDiffusionTrainConfig, workdir: epath.PathLike) -> int:
    """Encodes both splits into the folder `workdir`, going on where it stopped; an exit code.

    Every process writes its own shards with its own devices, and waits for the others at the end.
    """
    check(config)
    path = checkpoint.absolute(workdir)
    mesh = sharding.make_mesh(schema.MeshConfig(), jax.local_devices())
    devices = mesh.devices.size
    if config.batch_size % devices:
        raise ValueError(f"batch_size {config.batch_size} is not a multiple of {devices} devices")
    params, model = first_stage.find(config, workdir)
    sources = {split: data.open_source(config.data, split) for split in SPLITS}
    meta = describe(config, params, model, sources)
    open_cache(path, config, meta)

    run = make_encoder(config, model, mesh)
    placed = jax.device_put(params, sharding.replicated(mesh))
    mine = [
        (split, shard)
        for split, source in sources.items()
        for shard in cache.shards(split, len(source), config.cache.records_per_shard)
    ][jax.process_index() :: jax.process_count()]
    due = shards.find_due(path, sources, mine, "records to encode", needs_summary=False)
    shards.begin_again(path / "cache.json", due, _json(meta))
    total = sum(one.shard.last - one.shard.first for one in due)
    began, bad = time.perf_counter(), {split: set() for split in SPLITS}
    hidden = not progress.is_watched()
    with progress.Bar(total, unit="image", does="encoding", hidden=hidden) as bar:
        for one in due:
            read = Reader(config, sources[one.split], one.split == "train")
            encode_batch = functools.partial(run, placed)
            records = records_of(config, read, one.shard, encode_batch, bad[one.split])
            for _ in cache.write_shard(path / one.shard.name, records):
                bar.update()
            shards.write(path, one)
    if total:
        rate = total / (time.perf_counter() - began)
        LOG.info(
            f"{total} records in {total / rate:.1f} s, {rate / devices:.1f} images/s per device"
        )
    bad = {split: processes.union(broken) for split, broken in bad.items()}
    if any(bad.values()):
        count = sum(len(broken) for broken in bad.values())
        LOG.info(f"{count} records could not be decoded; the next readable ones replace them")
    processes.barrier("encoded")
    rundir.write_text(path / "cache.json", _json({**meta, "complete": True}))
    LOG.info(f"{path}: complete; train from it with --cache.path {path}")
    return 0


def check(config: schema.LatentDiffusionTrainConfig) -> None:
    """ValueError for settings without a valid cache."""
    if config.cache.path:
        raise ValueError("--cache.path names the cache to train from; encode writes to --workdir")
    if config.cache.views < 1 or config.cache.records_per_shard < 1:
        raise ValueError(
            f"--cache.views {config.cache.views} --cache.records-per-shard"
            f" {config.cache.records_per_shard}: give at least 1"
        )
    if config.cache.views > 1 and config.data.crop != "random":
        raise ValueError(
            f"--cache.views {config.cache.views}: all views of data.crop {config.data.crop!r} are"
            " the same; set data.crop to random, or leave it at 1"
        )
    examples.check(config.data, config.batch_size, config.seed)


def describe(
    config: schema.LatentDiffusionTrainConfig,
    params: dict,
    model: schema.FirstStageModelConfig,
    sources: dict[str, data.Source],
) -> dict[str, Any]:
    """cache.json of an encoding that is to be made. ValueError if first stage and data differ."""
    if model.in_channels != config.data.channels or config.data.size % model.downsample:
        raise ValueError(
            f"the first stage takes images of {model.in_channels} channels, of a multiple of"
            f" {model.downsample} pixels a side; the data have {config.data.channels} and"
            f" {config.data.size}"
        )
    model_config, classes = bundle.model_config(config, model), sources["train"].classes
    side = model_config.size // model.downsample
    moments = cache.MOMENTS if isinstance(model, schema.AutoencoderKLConfig) else ("mean",)
    return {
        "format": cache.FORMAT,
        "complete": False,
        "first_stage": rundir.params_hash(params),
        "model": serialize.to_dict(model),
        "data": serialize.to_dict(config.data),
        "classes": classes if classes is None else list(classes),
        "seed": config.seed,
        "views": config.cache.views,
        "dtype": config.cache.dtype,
        "compute": config.dtype,
        "splits": {
            split: {
                "records": len(source),
                "shards": len(cache.shards(split, len(source), config.cache.records_per_shard)),
                "features": sorted({*moments, *source.features} - {"image"}),
                "num_classes": source.num_classes,
                "shape": [side, side, model.embed_dim],
            }
            for split, source in sources.items()
        },
    }


def open_cache(
    path: epath.Path, config: schema.LatentDiffusionTrainConfig, meta: dict[str, Any]
) -> None:
    """Start a cache, or continue one with the same settings.

    ValueError if the folder holds something else; OSError if it cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is a file; --workdir takes a directory")
    known = cache.peek(path)
    if known is not None:
        cache.refuse_other(path, known, config.data, meta["first_stage"])
        before, now = (
            {k: v for k, v in x.items() if k not in ("complete", "data")} for x in (known, meta)
        )
        before.setdefault("classes", now["classes"])  # older versions kept none
        for name in now:
            if before.get(name) != now[name]:
                raise ValueError(
                    f"{path}: was started with {name} {before.get(name)}, now it is {now[name]};"
                    " repeat the former command, or encode into another folder"
                )
    elif path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
        raise ValueError(f"{path}: holds something else than a latent cache; give a new folder")
    processes.barrier("cache_looked")
    if jax.process_index() == 0:
        try:
            path.mkdir(parents=True, exist_ok=True)
            cache.drop_drafts(path)
            if known is None:
                rundir.write_text(path / "cache.json", _json(meta))
        except OSError as error:
            raise OSError(
                f"{path}: cannot be written ({error.strerror or error}); choose another --workdir"
            ) from error
    processes.barrier("cache_opened")


def make_encoder(
    config: schema.LatentDiffusionTrainConfig, model: schema.FirstStageModelConfig, mesh: Mesh
) -> Any:
    """run(params, images [B, H, W, c]) -> {"mean", "logvar"} or {"mean"}, compiled once.

    mesh: of this process's devices, over which the host array `images` is split.
    """
    module = autoencoder.from_config(
        model,
        dtype=jnp.dtype(config.dtype),
        attention=bundle.kernels(mesh, config.attention)["attention"],
    )
    split = sharding.batch_sharding(mesh)

    def run(params: dict, image: jax.Array) -> dict[str, jax.Array]:
        moments = module.apply({"params": params}, image, method="encode")
        moments = moments if isinstance(moments, tuple) else (moments,)
        return dict(zip(cache.MOMENTS, moments))

    jitted = jax.jit(run)
    # with several processes a jitted function cannot split host arrays: they are placed first
    return lambda params, image: jitted(params, sharding.place(image, split))


class Read(NamedTuple):
    """A record, ready to be encoded."""

    image: np.ndarray
    """float32 [views * flips, H, W, c]: every view, plain and then mirrored."""
    beside: dict[str, Any]
    """Fields that the cache keeps unencoded; see `cache.CacheSource`."""
    bad: tuple[int, ...]
    """Records before it that could not be decoded."""


class Reader:
    """Record -> `Read`; the views of record i are a function of (seed, view, i) alone."""

    def __init__(
        self, config: schema.LatentDiffusionTrainConfig, source: data.Source, train: bool
    ) -> None:
        self.source, self.seed = source, config.seed
        self.views = config.cache.views if train else 1
        self.flips = 2 if train and config.data.flip else 1
        # each record is read once, for all its views: a record cache would be useless
        images = dataclasses.replace(config.data, flip=False, keep_mib=0)
        self._make = examples.MakeExample(
            source, images, train, num_ids=conditioning.map_ids(config.cond)
        )

    def __call__(self, index: int) -> Read:
        made = [
            self._make(index, np.random.default_rng([self.seed, view, index]))
            for view in range(self.views)
        ]
        image = np.stack([one.example["image"] for one in made])
        if self.flips > 1:
            image = np.stack([image, image[:, :, ::-1]], axis=1).reshape(-1, *image.shape[1:])
        record = examples.read(self.source, made[0].record)
        beside = {name: record[name] for name in ("label", "caption") if name in record}
        for name, dtype in (("segmentation", np.int32), ("mask", np.uint8)):
            if name in made[0].example:
                maps = np.stack([one.example[name] for one in made])
                beside[name] = maps.reshape(maps.shape[:3]).astype(dtype)
        return Read(image, beside, tuple(i for i, _ in made[0].bad))


def records_of(
    config: schema.LatentDiffusionTrainConfig,
    read: Reader,
    shard: cache.Shard,
    run: Callable[[np.ndarray], dict[str, jax.Array]],
    bad: set[int],
) -> Iterator[dict[str, Any]]:
    """The records of a shard, in order; batches are read ahead, and run while others are written.

    `bad` collects those that could not be decoded. RuntimeError if they are too many.
    """
    each = read.views * read.flips
    group = max(1, config.batch_size // each)
    size = -(-group * each // config.batch_size) * config.batch_size  # of a call, filled up
    ahead = grain.ReadOptions(
        num_threads=config.data.threads, prefetch_buffer_size=config.data.read_ahead * group
    )
    reads = iter(grain.MapDataset.range(shard.first, shard.last).map(read).to_iter_dataset(ahead))

    def dispatch(part: list[Read]) -> dict[str, jax.Array]:
        for one in part:
            bad.update(one.bad)
            if one.bad:
                examples.check_limit(len(bad), read.source.describe(one.bad[-1]), config.data)
        image = np.concatenate([one.image for one in part])
        return run(np.concatenate([image, np.repeat(image[-1:], size - len(image), axis=0)]))

    parts = iter(lambda: list(itertools.islice(reads, group)), [])
    for part, moments in overlap.prefetch(parts, dispatch):
        yield from _cut(part, moments, read, config.cache.dtype)


def _cut(
    part: list[Read], moments: dict[str, jax.Array], read: Reader, dtype: str
) -> Iterator[dict[str, Any]]:
    """Split the result of a call into records. FloatingPointError for moments that are not
    finite."""
    host = {name: np.asarray(x, np.float32) for name, x in moments.items()}
    each = read.views * read.flips
    for i, one in enumerate(part):
        own = {name: x[i * each : (i + 1) * each] for name, x in host.items()}
        own = {n: x.reshape(read.views, read.flips, *x.shape[1:]) for n, x in own.items()}
        for name, x in own.items():
            kept = x.astype(dtype)
            if not np.isfinite(kept).all():
                raise FloatingPointError(
                    f"{name} of a latent is not finite as {dtype} (largest value"
                    f" {np.abs(x).max()}): the first stage is broken, or set --cache.dtype float32"
                )
            own[name] = kept
        yield {**own, **one.beside}


def _json(meta: dict[str, Any]) -> str:
    return json.dumps(meta, indent=2) + "\n"
