"""Encoding once and training from it: the same batches, the same losses, nothing stale."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
import recipes
from two_processes import codes, logs, two

from ldm_jax import data, schema, sharding, train_state
from ldm_jax.configs import tiny
from ldm_jax.data import cache
from ldm_jax.train import frozen, ldm, main
from ldm_jax.train.frozen import first_stage
from ldm_jax.train.prepare import encode

PER_SHARD = ("--cache.records-per-shard", "20")  # of 64 and 16 records: 4 shards and 1


@pytest.fixture(scope="module")
def cached(tmp_path_factory, first_stage_run):
    """A cache of tiny:class, mirrored, from the command line."""
    path = tmp_path_factory.mktemp("cached") / "cache"
    assert main.train(command(path, first_stage_run)) == 0
    return path


def command(path, run, *more):
    flags = ("--workdir", str(path), "--first-stage.path", str(run), "--data.flip")
    return ["encode", "tiny:class", *flags, *PER_SHARD, *more]


def config_of(run, path="", **changes):
    """tiny:class, mirrored, from the images or from a cache."""
    config = tiny.get_config("class")
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, flip=True, **changes),
        first_stage=schema.FirstStageConfig(path=str(run)),
        cache=schema.LatentCacheConfig(path=str(path)),
    )


def streams(config, cached, split="train"):
    """Rows of the images, and of the cache."""
    options = {"batch_size": config.batch_size, "seed": config.seed, "split": split}
    return data.stream(config.data, **options), data.stream(
        config.data, **options, cached=str(cached)
    )


def shards_in(path):
    return sorted(p for p in path.iterdir() if p.suffix == ".array_record")


def test_shards_and_what_they_say(cached):
    meta = cache.read(cached)
    assert [p.name for p in shards_in(cached)] == sorted(
        [*cache.shard_names("train", 4), *cache.shard_names("eval", 1)]
    )
    features = ["caption", "label", "logvar", "mask", "mean", "segmentation"]
    assert meta["splits"]["train"]["features"] == features
    assert cache.CacheSource(str(cached), "train")[3]["mean"].shape == (1, 2, 8, 8, 4)
    assert cache.CacheSource(str(cached), "eval")[3]["mean"].shape == (1, 1, 8, 8, 4)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_rows_are_those_of_the_images(cached, first_stage_run, split):
    """Order, mirroring, labels, maps; moments are what the first stage says of the row's image."""
    config, mesh = config_of(first_stage_run), recipes.mesh_of(data=1)
    plain, ours = streams(config, cached, split)
    found = first_stage.find(config, "unused")
    run = encode.make_encoder(config, found[1], mesh)
    rows = [(plain[i], ours[i]) for i in range(70, 86)]
    moments = run(found[0], np.stack([row["image"] for row, _ in rows]))
    for i, (row, own) in enumerate(rows):
        assert own["label"] == row["label"]
        assert np.array_equal(own["segmentation"], row["segmentation"])
        for name in cache.MOMENTS:
            np.testing.assert_allclose(own[name], moments[name][i], atol=2e-6)
    assert set(ours.spec) == set(rows[0][1])
    for name, (shape, dtype) in ours.spec.items():
        assert (rows[0][1][name].shape, rows[0][1][name].dtype) == (shape, dtype)


@pytest.mark.slow
def test_a_loss_from_the_cache_is_a_loss_from_the_images(cached, first_stage_run, tmp_path):
    """And the latent scale that is measured before."""
    mesh, values = recipes.mesh_of(data=1), []
    for path, stream in zip(("", cached), streams(config_of(first_stage_run), cached)):
        config = config_of(first_stage_run, path)
        net = dataclasses.replace(config.unet, channel_mult=(1,), scale_shift_norm=True)
        config = dataclasses.replace(config, unet=net)
        found = frozen.find(config, tmp_path / "run")
        run = tmp_path / f"run{bool(path)}"
        fixed = frozen.prepare(config, run, mesh, stream, found)
        shapes, _ = ldm.abstract_state(config, mesh)
        params = recipes.filled(shapes.params)
        keys = train_state.step_keys(jax.random.key(1), 0, ldm.DRAWS)
        keys = {n: train_state.example_keys(k, config.batch_size) for n, k in keys.items()}
        batch = data.global_batch(stream, 3, sharding.batch_sharding(mesh))
        loss = jax.jit(ldm.make_loss(config, fixed, mesh), static_argnums=3)
        found = loss(fixed.arguments, params, {"batch": batch, "keys": keys}, True)[0]
        values.append((fixed.scale, float(found)))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_what_is_whole_is_kept_and_the_rest_is_made(cached, first_stage_run, tmp_path, monkeypatch):
    """A writer that dies in its third shard, and one that runs out of disk."""
    path = tmp_path / "cache"
    true, calls = cache.write_shard, []

    def dies(target, records):
        calls.append(target.name)
        for count in true(target, records):
            if len(calls) == 3 and count == 5:
                raise KeyboardInterrupt
            yield count

    monkeypatch.setattr(cache, "write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        main.train(command(path, first_stage_run))
    with pytest.raises(ValueError, match="encoding has not finished"):
        cache.read(path)
    before = {p.name: p.stat().st_mtime_ns for p in shards_in(path)}
    assert len(before) == 2
    (path / ".train-00003-of-00004.array_record.1.part").write_bytes(b"half")
    monkeypatch.undo()

    class Full:
        def __init__(self, *_):
            pass

        def write(self, _):
            raise RuntimeError("No space left on device")

    monkeypatch.setattr(cache.array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(OSError, match=r"array_record: cannot be written \(No space left.*kept"):
        main.train(command(path, first_stage_run))
    monkeypatch.undo()

    assert main.train(command(path, first_stage_run)) == 0
    assert {n: t for n, t in before.items() if (path / n).stat().st_mtime_ns == t} == before
    assert not list(path.glob(".*"))
    for split in ("train", "eval"):
        ours, whole = (cache.CacheSource(str(p), split) for p in (path, cached))
        for i in range(len(whole)):
            assert_same(ours[i], whole[i])


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_random_crops_are_written_several_times(first_stage_run, tmp_path):
    flags = ("--data.crop", "random", "--data.allow-upscale", "--cache.views", "3")
    flags += ("--cache.dtype", "float16")
    assert main.train(command(tmp_path / "c", first_stage_run, *flags)) == 0
    found = cache.CacheSource(str(tmp_path / "c"), "train")[0]
    assert found["mean"].shape == (3, 2, 8, 8, 4)
    assert found["mean"].dtype == np.float16
    assert abs(found["mean"][0] - found["mean"][1]).max() > 1e-3
    config = config_of(first_stage_run, crop="random", allow_upscale=True)
    _, stream = streams(config, tmp_path / "c")
    seen = {stream[64 * epoch + i]["mean"].tobytes() for epoch in range(6) for i in range(4)}
    assert len(seen) > 6  # of 4 records, views and mirrored ones


def test_what_does_not_fit_is_refused(cached, first_stage_run, tmp_path):
    with pytest.raises(ValueError, match=r"another first stage \([0-9a-f]{16}, not"):
        first_stage.find(config_of("identity", cached), tmp_path)
    with pytest.raises(ValueError, match=r"made of other data: size: 16 -> 32"):
        streams(config_of(first_stage_run, size=32), cached)
    with pytest.raises(ValueError, match=r"started with dtype float32, now it is float16"):
        main.train(command(cached, first_stage_run, "--cache.dtype", "float16"))
    config = dataclasses.replace(
        tiny.get_config("superres"),
        data=config_of(first_stage_run).data,
        cache=schema.LatentCacheConfig(path=str(cached)),
    )
    found = first_stage.find(config_of(first_stage_run), tmp_path)
    _, stream = streams(config, cached)
    with pytest.raises(ValueError, match=r"low-resolution image, which is made from the image"):
        ldm.check(config, found[1], stream, recipes.mesh_of(data=1))
    with pytest.raises(ValueError, match="is no latent cache"):
        streams(config_of(first_stage_run), tmp_path)
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(ValueError, match=r"cache\.json: (damaged|is not JSON)"):
        cache.read(tmp_path)
    meta = json.loads((cached / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(ValueError, match="format 99 is newer"):
        cache.read(tmp_path)
    (tmp_path / "cache.json").write_text(json.dumps(meta))
    with pytest.raises(FileNotFoundError, match=r"train-00000-of-00004.*is missing"):
        cache.CacheSource(str(tmp_path), "train")
    with pytest.raises(ValueError, match="holds something else"):
        main.train(command(first_stage_run, first_stage_run))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--cache.views", "0"), "give at least 1"),
        (("--cache.views", "2"), "all views of data.crop 'center' are the same"),
        (("--cache.path", "x"), "encode writes to --workdir"),
        (("--batch-size", "6"), "batch_size 6 is not a multiple of 4 devices"),
    ],
)
def test_bad_flags(first_stage_run, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        main.train([*command(tmp_path / "c", first_stage_run), *flags])
    assert not os.listdir(tmp_path)


def test_processes_share_the_shards():
    every = cache.shards("train", 10, 3)
    assert [(s.first, s.last) for s in every] == [(0, 2), (2, 5), (5, 7), (7, 10)]
    assert [s.name for s in every] == cache.shard_names("train", 4)


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(cached, first_stage_run, tmp_path):
    """Each encodes its own shards, and nobody waits for another."""
    path = tmp_path / "cache"

    def run(address):
        own = command(path, first_stage_run)
        return ["-m", "ldm_jax.train.main", *own, "--distributed", address]

    with two(tmp_path, run) as processes:
        assert codes(tmp_path, processes) == [0, 0], logs(tmp_path)
    assert "0 of 3 shards are there; 48 records to encode" in (tmp_path / "0.log").read_text()
    names = sorted(p.name for p in cached.iterdir())
    assert sorted(p.name for p in path.iterdir()) == names
    for name in names:
        assert (path / name).read_bytes() == (cached / name).read_bytes(), name

    # one that is lost is made again, by whomever it belongs to
    lost = path / cache.shard_names("train", 4)[1]
    lost.unlink()
    with two(tmp_path, run) as processes:
        assert codes(tmp_path, processes) == [0, 0], logs(tmp_path)
    assert lost.read_bytes() == (cached / lost.name).read_bytes()
