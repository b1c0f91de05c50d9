"""Buckets, as epath finds them through fsspec: which readers and writers take such paths."""

import json
import sys

import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from packed_folder import config_of, folder, source_of  # noqa: F401

from ldm_jax.configs import tiny
from ldm_jax.data import cache
from ldm_jax.data.folder import FolderSource
from ldm_jax.runtime import images, rundir
from ldm_jax.sample import options, write
from ldm_jax.train.prepare import pack


class Bucket(MemoryFileSystem):
    """Answers to s3:// without a network."""

    protocol = ("s3",)
    store, pseudo_dirs = {}, [""]


@pytest.fixture
def bucket(monkeypatch):
    """s3://bucket in memory, as epath finds it."""
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", Bucket)
    backend.fsspec_backend._get_filesystem.cache_clear()
    Bucket.store.clear()
    yield epath.Path("s3://bucket")
    backend.fsspec_backend._get_filesystem.cache_clear()


def test_a_folder_in_a_bucket_is_read_and_packed(folder, tmp_path, bucket):  # noqa: F811
    for path in folder.rglob("*"):
        if path.is_file():
            target = bucket / "images" / str(path.relative_to(folder))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    ours, plain = (FolderSource(config_of(p).source, "train") for p in (bucket / "images", folder))
    assert [ours[i] for i in range(len(ours))] == [plain[i] for i in range(len(plain))]
    assert ours.describe(0) == "s3://bucket/images/a/02.png"

    assert pack.pack(config_of(bucket / "images"), tmp_path / "packed", per_shard=4) == 0
    found = source_of(config_of(tmp_path / "packed"))
    assert [found[i] for i in range(len(found))] == [plain[i] for i in range(len(plain))]

    # written to a bucket, but not read from there
    assert pack.pack(config_of(folder), bucket / "packed", per_shard=4) == 0
    for path in (bucket / "packed").iterdir():
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    assert len(source_of(config_of(tmp_path / "copy"))) == 10
    with pytest.raises(ValueError, match=r"from a file system only: mount the bucket"):
        source_of(config_of(bucket / "packed"))


def test_a_run_and_its_metrics(bucket):
    run, changed = rundir.open_run(bucket / "runs" / "one", tiny.get_config("class"))
    assert changed == []
    assert rundir.is_run(bucket / "runs" / "one")
    rundir.write_latents(run, {"scale": 0.5, "how": "measured"})
    assert rundir.read_latents(run)["scale"] == 0.5
    _, changed = rundir.open_run(run, tiny.get_config("class"))
    assert changed == []
    assert json.loads((run / "config.json").read_text())["format"]
    with pytest.raises(ValueError, match="holds another run"):
        rundir.open_run(run, tiny.get_config("label"))


def test_images_that_are_sampled(bucket):
    asked = options.Options(model="", out=str(bucket / "samples"))
    out = write.open_out(asked)
    pixels = np.full((4, 4, 3), 7, np.uint8)
    images.save_png(out / "previews" / "a.png", pixels)
    images.save_png(out / "a.png", pixels, {"seed": 3})
    np.testing.assert_array_equal(write.read_picture(out, asked, "a"), pixels)
    assert images.read_settings(out / "a.png") == {"seed": 3}
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "previews"]
    with pytest.raises(ValueError, match="already holds images"):
        write.open_out(asked)


def test_a_latent_cache_is_written_there_and_refused_from_there(bucket, tmp_path):
    shard = bucket / "cache" / cache.shard_names("train", 1)[0]
    shard.parent.mkdir(parents=True)
    records = [{"mean": np.full((1, 1, 2, 2, 1), i, np.float32)} for i in range(3)]
    assert list(cache.write_shard(shard, records)) == [1, 2, 3]
    with pytest.raises(ValueError, match=r"s3://bucket/cache: ArrayRecord .* mount the bucket"):
        cache.Shards(str(shard.parent), "train", 1, "ldm-train encode")
    (tmp_path / shard.name).write_bytes(shard.read_bytes())
    assert len(cache.Shards(tmp_path, "train", 1, "ldm-train encode")) == 3
