"""Packs and caches of files that have changed since: shards are made again, and only those."""

import dataclasses
import json
import os

import numpy as np
import pytest
from PIL import Image

from ldm_jax import data, schema
from ldm_jax.configs import tiny
from ldm_jax.data import cache, packed
from ldm_jax.runtime.log import LOG
from ldm_jax.train.prepare import encode, pack, shards


@pytest.fixture
def images(tmp_path):
    """Six images with captions, of which the first is held out."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (4, 4), (40 * i, 0, 0)).save(folder / f"{i}.png", compress_level=0)
        (folder / f"{i}.txt").write_text(f"number {i}")
    return folder


def config_of(path, **fields):
    source = schema.FolderConfig(str(path), eval_every=6, captions="sidecar", **fields)
    return schema.DataConfig(source=source, size=4)


def replaced(folder):
    """An image of as many bytes, a moment later."""
    file = folder / "3.png"
    before = file.stat()
    draft = folder / "draft"
    Image.new("RGB", (4, 4), "green").save(draft, "png", compress_level=0)
    assert draft.stat().st_size == before.st_size
    os.utime(draft, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    draft.replace(file)


CHANGES = {
    "an edited caption": lambda f: (f / "3.txt").write_text("NUMBER 3"),
    "a longer caption": lambda f: (f / "3.txt").write_text("number three"),
    "another image": lambda f: Image.new("RGB", (8, 8), "green").save(f / "3.png"),
    "an image of as many bytes": replaced,
    "a renamed image": lambda f: (
        (f / "3.png").rename(f / "3b.png"), (f / "3.txt").rename(f / "3b.txt"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_pack_follows_its_folder(images, tmp_path, caplog, change):
    caplog.set_level("INFO", logger=LOG.name)
    path = tmp_path / "packed"
    assert pack.pack(config_of(images), path, per_shard=2) == 0
    times = {f.name: f.stat().st_mtime_ns for f in path.glob("*.array_record")}
    caplog.clear()
    assert pack.pack(config_of(images), path, per_shard=2) == 0
    assert caplog.messages[0] == "4 of 4 shards are there; 0 images to pack"
    CHANGES[change](images)
    caplog.clear()
    assert pack.pack(config_of(images), path, per_shard=2) == 0
    assert caplog.messages[0] == (
        "3 of 4 shards are there; 2 images to pack; files of 1 shards have changed since they were"
        " written"
    )
    now = {f.name: f.stat().st_mtime_ns for f in path.glob("*.array_record")}
    assert [name for name in times if now[name] != times[name]] == [
        "train-00001-of-00003.array_record"
    ]
    assert packed.read(path)["complete"]
    ours, plain = (data.open_source(config_of(p), "train") for p in (path, images))
    assert [ours[i] for i in range(5)] == [plain[i] for i in range(5)]


def test_a_class_that_is_renamed_is_another_pack(images, tmp_path):
    for name in ("cat", "dog"):
        (images / name).mkdir()
        for end in ("png", "txt"):
            (images / f"{1 if name == 'cat' else 2}.{end}").rename(images / name / f"1.{end}")
    for i in (0, 3, 4, 5):
        (images / f"{i}.png").unlink()
    config = config_of(images, class_from_folder=True)
    config = dataclasses.replace(
        config, source=dataclasses.replace(config.source, eval_path=str(images))
    )
    pack.pack(config, tmp_path / "packed")
    (images / "cat").rename(images / "ewe")
    with pytest.raises(ValueError, match=r"was started with classes \['cat', 'dog'\], now it is"):
        pack.pack(config, tmp_path / "packed")


def test_an_interrupted_repair_is_no_complete_pack(images, tmp_path, monkeypatch):
    path = tmp_path / "packed"
    pack.pack(config_of(images), path, per_shard=2)
    (images / "3.txt").write_text("three")

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pack, "write_summary", dies)
    with pytest.raises(KeyboardInterrupt):
        pack.pack(config_of(images), path, per_shard=2)
    with pytest.raises(ValueError, match="packing has not finished"):
        packed.read(path)
    monkeypatch.undo()
    assert pack.pack(config_of(images), path, per_shard=2) == 0
    assert data.open_source(config_of(path), "train")[2]["caption"] == "three"


@pytest.mark.parametrize("change", [*CHANGES, "a new image", "nothing", "gone"])
def test_a_run_says_that_its_cache_is_stale(images, tmp_path, caplog, change):
    config, path = config_of(images), tmp_path / "cache"
    sources = {split: data.open_source(config, split) for split in ("train", "eval")}
    path.mkdir()
    splits = {}
    for split, source in sources.items():
        known = cache.shards(split, len(source), 2)
        splits[split] = {"records": len(source), "shards": len(known)}
        for shard in known:
            shards.write(
                path, shards.Due(split, shard, data.stamp(source, shard.first, shard.last))
            )
    facts = {"format": 1, "complete": True, "first_stage": "", "splits": splits}
    (path / "cache.json").write_text(json.dumps(facts))
    {
        **CHANGES,
        "a new image": lambda f: [(f / f"4b.{n}").write_bytes(b"") for n in ("png", "txt")],
        "nothing": lambda f: None,
        "gone": lambda f: f.rename(f.parent / "elsewhere"),
    }[change](images)
    shards.warn_of_changes(path, config)
    if change in ("nothing", "gone"):
        assert not caplog.messages
        return
    (line,) = caplog.messages
    count, again = (2, "into another") if change == "a new image" else (1, "once more")
    assert line.startswith(f"warning: {count} of 4 shards of {path} were encoded from files that")
    assert f"in {images}: this run trains on them as they were; `ldm-train encode` {again}" in line


def test_shards_of_an_older_version_are_taken_once(images, tmp_path, caplog):
    """They have no summary in a cache, and one without a stamp in a pack."""
    caplog.set_level("INFO", logger=LOG.name)
    sources = {"train": data.open_source(config_of(images), "train")}
    (shard,) = cache.shards("train", 5, 8)
    (tmp_path / shard.name).write_bytes(b"")

    def due(needs_summary=False):
        given = (tmp_path, sources, [("train", shard)], "records")
        return shards.find_due(*given, needs_summary=needs_summary)

    assert len(due(needs_summary=True)) == 1
    assert due() == []
    assert caplog.messages[-1].endswith("; 1 shards of an older version are taken as they are")
    assert due() == []
    assert caplog.messages[-1] == "1 of 1 shards are there; 0 records"
    (images / "3.txt").write_text("three")
    assert [one.shard for one in due()] == [shard]
    assert not (tmp_path / shard.name).exists()  # whoever is interrupted now does not take it
    shards.write(tmp_path, due()[0], records=5)
    assert json.loads(shards.summary_path(tmp_path, shard).read_text())["records"] == 5
    (tmp_path / shard.name).write_bytes(b"")
    shards.summary_path(tmp_path, shard).write_text("{")
    with pytest.raises(ValueError, match=r"00001\.json: is not JSON .*; remove it and run again"):
        due()


def test_a_stamp_is_of_its_own_records(images, tmp_path):
    source = data.open_source(config_of(images), "train")
    before = [data.stamp(source, i, i + 1) for i in range(5)]
    assert len(set(before)) == 5
    (images / "3.txt").write_text("three")
    after = [data.stamp(source, i, i + 1) for i in range(5)]
    assert [a != b for a, b in zip(after, before)] == [False, False, True, False, False]
    table = tmp_path / "images" / "metadata.jsonl"
    lines = [{"file_name": f"{i}.png", "text": f"text {i}"} for i in range(6)]

    def stamps():
        table.write_text("".join(json.dumps(line) + "\n" for line in lines))
        named = schema.FolderConfig(str(images), eval_every=6, captions="metadata")
        opened = data.open_source(schema.DataConfig(source=named), "train")
        return np.array([data.stamp(opened, i, i + 1) for i in range(5)])

    first, lines[2]["text"] = stamps(), "another"
    assert (first != stamps()).tolist() == [False, True, False, False, False]
    synthetic = data.open_source(schema.DataConfig(), "train")
    assert data.stamp(synthetic, 0, 1) == ""


def test_a_cache_of_a_pack_follows_it(images, tmp_path):
    path = tmp_path / "packed"
    pack.pack(config_of(images), path, per_shard=2)
    before = data.stamp(data.open_source(config_of(path), "train"), 0, 1)
    (images / "3.txt").write_text("three")
    pack.pack(config_of(images), path, per_shard=2)
    assert data.stamp(data.open_source(config_of(path), "train"), 0, 1) != before


def test_a_cache_of_other_classes_is_another_cache(images, tmp_path):
    """One of an older version kept no names and goes on."""
    (images / "a").mkdir()
    for i in range(6):
        for end in ("png", "txt"):
            (images / f"{i}.{end}").rename(images / "a" / f"{i}.{end}")
    config = tiny.get_config("class")
    config = dataclasses.replace(config, data=config_of(images, class_from_folder=True))
    sources = {split: data.open_source(config.data, split) for split in ("train", "eval")}
    stage = schema.IdentityFirstStageConfig(3)
    meta = encode.describe(config, {}, stage, sources)
    assert meta["classes"] == ["a"]
    path = tmp_path / "cache"
    encode.open_cache(path, config, meta)
    encode.open_cache(path, config, meta)
    with pytest.raises(ValueError, match=r"was started with classes \['a'\], now it is \['b'\]"):
        encode.open_cache(path, config, {**meta, "classes": ["b"]})
    older = {name: value for name, value in meta.items() if name != "classes"}
    (path / "cache.json").write_text(json.dumps(older))
    encode.open_cache(path, config, meta)
    complete = {**meta, "complete": True}
    (path / "cache.json").write_text(json.dumps(complete))
    assert cache.read(path)["classes"] == ["a"]
