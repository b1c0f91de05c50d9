"""The start of a run: checks, opening or resuming, and its report."""

import dataclasses
import importlib.metadata
import math
import platform
import socket
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from ldm_jax import data, schema, sharding, train_state
from ldm_jax.models import blocks
from ldm_jax.runtime import checkpoint, log, rundir
from ldm_jax.runtime.checkpoint_manager import Manager
from ldm_jax.runtime.log import LOG
from ldm_jax.train.run import logs, profiling, writers
from ldm_jax.train.run.monitor import count_parameters

PARTS = {  # fields of a state, as the report sums them up
    "params": "parameters",
    "ema_params": "average",
    "opt_state": "optimizer",
    "disc_params": "discriminator",
    "disc_stats": "discriminator",
    "disc_opt_state": "its optimizer",
}

SHOWS = 32  # pixels of a side


def check(config: schema.BaseTrainConfig, mesh: Mesh) -> None:
    """ValueError for fields that every recipe has and that do not fit each other or the mesh."""
    if config.steps < 1:
        raise ValueError(f"--steps {config.steps}: give at least 1")
    for name in ("optimizer", "disc_optimizer"):
        if getattr(config, name, None) is not None:
            train_state.check_optimizer(getattr(config, name), name)
    profiling.window(config.profile, config.steps)
    sharding.check_batch(config.batch_size, mesh, config.accumulate)
    train_state.check_spikes(config.spikes)
    writers.check(config)


def warn_of_single_channels(config: schema.BaseTrainConfig) -> None:
    """Warn where a GroupNorm's groups are single channels: it then takes their means away.

    Not below `SHOWS` pixels, where it did no harm that shows (the digits of the demo, 16x16).
    """
    if config.data.size < SHOWS:
        return
    for part, field in {"model": "channels", "unet": "model_channels"}.items():
        model = getattr(config, part, None)
        if model is not None and getattr(model, field) * min(model.channel_mult) <= blocks.GROUPS:
            option = f"--{part}.{field.replace('_', '-')}"
            LOG.warning(
                "warning: %s %d with --%s.channel-mult %s: GroupNorm has %d groups, and a group of"
                " one channel loses its mean over the image: flat areas come out grey; 64 keeps it",
                *(option, getattr(model, field), part, " ".join(map(str, model.channel_mult))),
                blocks.GROUPS,
            )


def open_run(workdir: epath.PathLike, config: schema.BaseTrainConfig) -> epath.Path:
    """The run at `workdir`, created or resumed; begins its log, and reports changed fields."""
    run, changes = rundir.open_run(workdir, config)
    logs.begin(run)
    for change in changes:
        LOG.info(f"changed on resume: {change}")
    return run


def resume(run: epath.Path, manager: Manager, shapes: Any, shardings: Any) -> Any | None:
    """The state of the newest checkpoint, placed; None without one. Later metrics are dropped."""
    state = checkpoint.resume(manager, sharding.with_shardings(shapes, shardings))
    if state is not None:
        rundir.drop_metrics_after(run, int(state.step))
    elif (last := max(checkpoint.snapshot_steps(run), default=0)) > 0:
        LOG.warning(
            "the run has no checkpoint, and begins anew at step 0; its snapshots, the last of step"
            f" {last}, stay until the same steps are reached"
        )
    return state


def report(config: schema.BaseTrainConfig, mesh: Mesh, state: Any, stream: data.Stream) -> None:
    """Report the run once, and in the log of every process the part of that process."""
    trees = dict(state.params)
    if getattr(state, "disc_params", None):
        trees["discriminator"] = state.disc_params
    counts = ", ".join(f"{n} {count_parameters(p) / 1e6:.2f} M" for n, p in trees.items())
    examples = data.pipeline.local_examples(config.batch_size, sharding.batch_sharding(mesh))
    splits = mesh.shape["data"] * mesh.shape["fsdp"]
    micro = f" in {config.accumulate} microbatches" if config.accumulate > 1 else ""
    held = bytes_per_device(state)
    parts = [f"{part} {_size(size)}" for part, size in held.items() if size >= 2**10]
    cache = jax.config.jax_compilation_cache_dir
    for line in (
        f"{jax.process_count()} processes, {jax.device_count()} devices"
        f" ({mesh.devices.flat[0].device_kind}), {jax.local_device_count()} of them in each"
        f" process; {_versions()}",
        f"parameters: {counts}; {stream.num_records} images; mesh {dict(mesh.shape)}",
        f"state: {_size(sum(held.values()))} per device ({', '.join(parts)})",
        f"batch {config.batch_size}: {config.batch_size // splits} per device{micro},"
        f" {len(examples)} read by each process",
        f"compiled programs: {cache or 'not kept'}" + (", written by process 0" if cache else ""),
    ):
        LOG.info(line)
    warn_of_single_channels(config)
    LOG.info(
        "process %d of %d on %s: devices %s; reads examples %s of every batch",
        *(jax.process_index(), jax.process_count(), socket.gethostname()),
        [device.id for device in jax.local_devices()],
        _ranges(examples),
        extra=log.ONLY_FILE,
    )


def bytes_per_device(state: Any) -> dict[str, int]:
    """{part: bytes of the largest shards} of a state of arrays, or of shapes with shardings."""
    held: dict[str, int] = {}
    for field in dataclasses.fields(state):
        part = PARTS.get(field.name, "other")
        size = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(getattr(state, field.name))
        )
        held[part] = held.get(part, 0) + size
    return {part: size for part, size in held.items() if size}


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def _ranges(numbers: list[int]) -> str:
    """`0-3, 8-11`."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(f"{a}-{b}" for a, b in zip(starts, ends))


def _versions() -> str:
    names = ("ldm_jax", "jax", "jaxlib", "libtpu")
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join([*versions, f"Python {platform.python_version()}"])
