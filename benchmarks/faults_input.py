"""Configs of the fault runs and bad input for them: unreadable images, NaN and huge latents."""

import dataclasses
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from etils import epath
from PIL import Image

from ldm_jax import data, schema
from ldm_jax.configs import tiny
from ldm_jax.data import cache

SAVE = 5  # steps between two checkpoints
RECORDS = 2048  # more than a run reads, so that a bad one comes once
BAD_STEPS = (7, 12, 13)  # batches, counted from 0, that hold a bad record

CONFIG = '''"""Written by benchmarks/faults.py."""

import dataclasses

from ldm_jax import schema
from ldm_jax.configs import tiny


def get_config(stage="clean"):
    config = tiny.get_config("unconditional")
    unet = dataclasses.replace(config.unet, channel_mult=(1,), attention_downsample=(), dropout=0.1)
    source = schema.SyntheticConfig(num_images={records}, size=16, num_classes=4)
    if stage in ("folder", "images"):
        path = {images!r} if stage == "folder" else {own!r}
        source = schema.FolderConfig(path)
    diffusion = config.diffusion
    if stage == "latents":  # whose loss grows with the latent
        diffusion = dataclasses.replace(diffusion, prediction="x0")
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source=source, flip=stage != "latents"),
        first_stage=schema.FirstStageConfig({first_stage!r}, scale_images=16),
        unet=unet,
        diffusion=diffusion,
        intervals=schema.IntervalConfig(log=1, save={save}, snapshot=0, evaluate=0, sample=0),
        max_to_keep=3,
    )
'''


def prepare(work: Path) -> str:
    """Trains the first stage, writes images and config; the path of the config."""
    first_stage, images = work / "first_stage", work / "images"
    config = work / "faults_config.py"
    own = images_of(work)
    values = {"records": RECORDS, "first_stage": str(first_stage)}
    values |= {"images": str(images), "own": str(own)}
    config.write_text(CONFIG.format(**values, save=SAVE))
    if not (first_stage / "snapshots").exists():
        command("tiny:first_stage", "--workdir", str(first_stage))
    if not images.exists():
        write_images(own)
        shutil.copytree(own, work / "images.part")
        break_images(work / "images.part")
        (work / "images.part").rename(images)
    return str(config)


def images_of(work: Path) -> Path:
    """The images that no file is broken of."""
    return work / "whole_images"


def command(*words: str) -> None:
    """Runs ldm-train alone on one device."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    full = [sys.executable, "-m", "ldm_jax.train.main", *words]
    subprocess.run(full, check=True, env=environment)


def write_images(folder: Path) -> None:
    """The first images of the synthetic source, as files by class."""
    config = schema.DataConfig(
        source=schema.SyntheticConfig(num_images=RECORDS, size=16, num_classes=4), size=16
    )
    source = data.sources.open_source(config, "train")
    for i in range(RECORDS):
        record = source[i]
        image = record["image"]  # bytes, an array or a picture, as the source has it
        image = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else np.asarray(image)
        path = folder / str(record["label"]) / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(image)).save(path)


def records_at(
    config: schema.DataConfig, batch_size: int, seed: int, cached: str = ""
) -> list[int]:
    """Of every batch in BAD_STEPS the record of its second row."""
    stream = data.stream(config, batch_size=batch_size, seed=seed, cached=cached)
    return [stream.made[step * batch_size + 1].record for step in BAD_STEPS]


def break_images(folder: Path) -> None:
    """Cuts the files of three records in half."""
    config = tiny.get_config("unconditional")
    source = schema.FolderConfig(str(folder))
    broken = dataclasses.replace(config.data, source=source, flip=True)
    found = data.stream(broken, batch_size=config.batch_size, seed=config.seed).source
    for record in records_at(broken, config.batch_size, config.seed):
        path = Path(found.describe(record))
        path.write_bytes(path.read_bytes()[:60])


def latents(work: Path, config_path: str) -> str:
    """A latent cache with one record that is NaN and two that are a thousand times as large."""
    folder = work / "latents"
    if folder.exists():
        return str(folder)
    draft = work / "latents.part"
    command("encode", f"{config_path}:latents", "--workdir", str(draft))
    config = tiny.get_config("unconditional")
    source = schema.SyntheticConfig(num_images=RECORDS, size=16, num_classes=4)
    clean = dataclasses.replace(config.data, source=source, flip=False)
    bad = records_at(clean, config.batch_size, config.seed, str(draft))
    records = cache.CacheSource(str(draft), "train")
    known = cache.read(str(draft))["splits"]["train"]
    shards = cache.shards("train", len(records), -(-len(records) // known["shards"]))
    for shard in shards:
        new = [records[i] for i in range(shard.first, shard.last)]
        for i in set(bad) & set(range(shard.first, shard.last)):
            mean = np.array(new[i - shard.first]["mean"])
            factor = np.nan if i == bad[0] else 1e3
            new[i - shard.first]["mean"] = (mean * factor).astype(mean.dtype)
        list(cache.write_shard(epath.Path(draft / shard.name), new))
    draft.rename(folder)
    return str(folder)
