"""A folder of images in ArrayRecord files: the same records in the same order, and what is not."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from array_record.python import array_record_module
from flax import serialization
from packed_folder import config_of, source_of

from ldm_jax import data, schema
from ldm_jax.data import packed
from ldm_jax.runtime import processes
from ldm_jax.train.prepare import pack


def files_in(path):
    return {p.name: p.stat().st_mtime_ns for p in path.iterdir()}


def test_records_and_rows_are_those_of_the_folder(folder, tmp_path):
    assert pack.pack(config_of(folder), tmp_path / "packed", per_shard=4) == 0
    for split, count in (("train", 10), ("eval", 3)):
        plain, ours = (source_of(config_of(p), split) for p in (folder, tmp_path / "packed"))
        assert isinstance(ours, packed.PackedSource)
        assert len(ours) == len(plain) == count
        assert (ours.features, ours.num_classes) == (plain.features, plain.num_classes)
        assert [ours[i] for i in range(count)] == [plain[i] for i in range(count)]
    assert source_of(config_of(tmp_path / "packed")).describe(1).endswith("record 1 (a/04.png)")
    plain, ours = (
        data.stream(config_of(p), batch_size=4, seed=1) for p in (folder, tmp_path / "packed")
    )
    for i in range(8, 12):
        for name, value in plain[i].items():
            np.testing.assert_array_equal(ours[i][name], value)
    meta = packed.read(tmp_path / "packed")
    assert meta["classes"] == ["a", "b"]
    assert [x["shards"] for x in meta["splits"].values()] == [3, 1]
    assert (tmp_path / "packed" / "left_out.txt").read_text() == ""


def test_what_cannot_be_decoded_is_left_out_and_named(folder, tmp_path, capsys, shown):
    for name in ("a/02.png", "b/09.png"):
        (folder / name).write_bytes(b"\x89PNG broken")
    (folder / "b" / "07_mask.png").write_bytes(b"")
    assert pack.pack(config_of(folder), tmp_path / "packed", per_shard=2) == 0
    said = capsys.readouterr().err
    assert "a/02.png: cannot be used (" in said
    assert "8 images to train and 2 held out; 3 left out, in left_out.txt" in said
    lines = (tmp_path / "packed" / "left_out.txt").read_text().splitlines()
    assert [line.split("\t")[:2] for line in lines] == [
        ["train", "a/02.png"], ["train", "b/09.png"], ["eval", "b/07.png"],
    ]  # fmt: skip
    ours = source_of(config_of(tmp_path / "packed"))
    plain = source_of(config_of(folder))
    kept = [i for i in range(10) if not plain.describe(i).endswith(("02.png", "09.png"))]
    assert [ours[i] for i in range(len(ours))] == [plain[i] for i in kept]

    few = dataclasses.replace(config_of(folder), max_bad_records=1)
    with pytest.raises(RuntimeError, match=r"2 records cannot be used, the last: b/09.png"):
        pack.pack(few, tmp_path / "few", per_shard=2)


def test_it_goes_on_where_it_stopped(folder, tmp_path, monkeypatch):
    path, true = tmp_path / "packed", pack.write_summary

    def dies(where, shard, left_out):
        if len(list(where.glob("*.json"))) == 3:
            raise KeyboardInterrupt
        true(where, shard, left_out)

    monkeypatch.setattr(pack, "write_summary", dies)
    with pytest.raises(KeyboardInterrupt):
        pack.pack(config_of(folder), path, per_shard=4)
    with pytest.raises(ValueError, match="packing has not finished"):
        source_of(config_of(path))
    before = {
        n: t for n, t in files_in(path).items() if n.startswith(("train-00000", "train-00001"))
    }
    assert len(before) == 4
    monkeypatch.undo()
    assert pack.pack(config_of(folder), path, per_shard=4) == 0
    assert {n: t for n, t in files_in(path).items() if n in before} == before
    assert len(source_of(config_of(path))) == 10


def test_processes_share_the_shards(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "barrier", lambda name: None)
    monkeypatch.setattr(pack, "finish", lambda *_: None)
    seen = []
    for index in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        pack.pack(config_of(folder), tmp_path / "packed", per_shard=4)
        seen.append({n for n in files_in(tmp_path / "packed") if n.endswith(".array_record")})
    assert [len(s) for s in seen] == [2, 4]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"captions": "none"}, "was packed with source.captions 'sidecar', and here it is 'none'"),
        ({"eval_path": "x"}, r"is packed, with its held-out images; leave out source.eval_path"),
    ],
)
def test_a_config_that_asks_for_other_records_is_refused(folder, tmp_path, fields, message):
    pack.pack(config_of(folder), tmp_path / "packed")
    with pytest.raises(ValueError, match=message):
        source_of(config_of(tmp_path / "packed", **fields))


def test_what_cannot_be_packed_or_read_is_refused(folder, tmp_path):
    path = tmp_path / "packed"
    with pytest.raises(
        ValueError, match=r"pack takes images in a folder, and data.source is synth"
    ):
        pack.pack(schema.DataConfig(), path)
    with pytest.raises(ValueError, match="holds something else than packed images"):
        pack.pack(config_of(folder), folder)
    pack.pack(config_of(folder), path)
    with pytest.raises(ValueError, match="is packed already"):
        pack.pack(config_of(path), tmp_path / "again")
    with pytest.raises(ValueError, match=r"was started with .*'shards': 1.*--records-per-shard"):
        pack.pack(config_of(folder), path, per_shard=2)

    meta = json.loads((path / "pack.json").read_text())
    (path / "train-00000-of-00001.array_record").unlink()
    with pytest.raises(FileNotFoundError, match=r"run `ldm-train pack` again"):
        source_of(config_of(path))
    (path / "pack.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(ValueError, match="format 99 is newer"):
        source_of(config_of(path))
    (path / "pack.json").write_text("[]")
    with pytest.raises(ValueError, match=r"pack\.json: holds a list"):
        source_of(config_of(path))


@pytest.mark.parametrize("how", ["cut", "empty"])
def test_a_damaged_shard_is_named(folder, tmp_path, how):
    assert pack.pack(config_of(folder), tmp_path / "packed", per_shard=4) == 0
    shard = tmp_path / "packed" / "train-00001-of-00003.array_record"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2] if how == "cut" else b"")
    with pytest.raises(ValueError, match=rf"^{shard}: is damaged or cut off.*`ldm-train pack`"):
        source_of(config_of(tmp_path / "packed"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xc1", "record 0 of train: .*make its shard anew with `ldm-train pack`"),
        (serialization.msgpack_serialize([1]), "record 0 of train: .*is list, not names"),
        (serialization.msgpack_serialize({"file": "a"}), "holds no image; pack the images again"),
        (None, r"record 0 of train: is damaged \(.*chunk"),
    ],
)
def test_a_damaged_record_is_named(folder, tmp_path, content, message):
    assert pack.pack(config_of(folder), tmp_path / "packed", per_shard=100) == 0
    (shard,) = (tmp_path / "packed").glob("train-*.array_record")
    if content is None:
        data = bytearray(shard.read_bytes())
        data[data.index(b"\x89PNG") + 20] ^= 255
        shard.write_bytes(data)
    else:
        writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1")
        for _ in range(10):
            writer.write(content)
        writer.close()
    with pytest.raises(ValueError, match=message):
        source_of(config_of(tmp_path / "packed"))[0]
