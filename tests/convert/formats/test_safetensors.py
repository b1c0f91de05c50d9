"""The safetensors reader and writer against the official library, on lying headers, and shards."""

import json
import os
import struct
import weakref

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from ldm_jax.convert.formats import files, safetensors_file, shards, torch_file

RNG = np.random.default_rng(0)
NAMED = {
    "conv.weight": RNG.normal(size=(4, 3, 2, 2)).astype(np.float32),
    "half": RNG.normal(size=(5,)).astype(np.float16),
    "brain": RNG.normal(size=(3, 3)).astype(ml_dtypes.bfloat16),
    "double": RNG.normal(size=(2,)),
    "scalar": np.array(0.18215, np.float32),
    "empty": np.zeros((0, 7), np.float32),
    "ids": np.arange(77)[None],
    "bool": np.array([True, False, True]),
    "byte": np.arange(5, dtype=np.uint8),
    "é.weight": np.array([1, -2], np.int8),
}


def raw(path, header, data: bytes = b"", length: int | None = None):
    """A file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin=0, end=16, shape=(4,), dtype="F32", **more) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


def same(read, wanted) -> None:
    assert set(read) == set(wanted)
    for name, x in wanted.items():
        found = np.asarray(read[name])
        assert found.dtype == x.dtype
        assert found.shape == x.shape
        assert found.tobytes() == x.tobytes()


def test_the_official_writer_s_files_are_read(tmp_path):
    safetensors.numpy.save_file(NAMED, tmp_path / "a", metadata={"format": "pt", "step": "3"})
    same(safetensors_file.read(tmp_path / "a"), NAMED)
    assert safetensors_file.metadata(tmp_path / "a") == {"format": "pt", "step": "3"}
    found, info = files.open_state_dict(tmp_path / "a")
    same(found, NAMED)
    assert info == files.Info("safetensors", {"format": "pt", "step": "3"}, ())


def test_the_official_reader_reads_what_is_written(tmp_path):
    safetensors_file.write(tmp_path / "a", NAMED, {"format": "pt"})
    same(safetensors.numpy.load_file(tmp_path / "a"), NAMED)
    assert os.listdir(tmp_path) == ["a"]
    safetensors.numpy.save_file(NAMED, tmp_path / "b", metadata={"format": "pt"})
    assert (tmp_path / "a").stat().st_size == (tmp_path / "b").stat().st_size


def test_jax_lazy_and_strided_arrays_are_written(tmp_path):
    safetensors_file.write(tmp_path / "a", NAMED)
    lazy = safetensors_file.read(tmp_path / "a")
    arrays = {"jax": jnp.arange(3, dtype=jnp.bfloat16), "t": np.eye(3, 5, dtype="f4").T, **lazy}
    safetensors_file.write(tmp_path / "b", arrays)
    same(safetensors_file.read(tmp_path / "b"), {k: np.asarray(v) for k, v in arrays.items()})


def test_nothing(tmp_path):
    safetensors_file.write(tmp_path / "a", {})
    assert safetensors_file.read(tmp_path / "a") == {}
    assert safetensors.numpy.load_file(tmp_path / "a") == {}


def test_a_stream_holds_one_array_at_a_time(tmp_path):
    made = []

    def arrays():
        for name in reversed(NAMED):
            assert all(before() is None for before in made)
            x = NAMED[name].copy()
            made.append(weakref.ref(x))
            yield name, x
            del x

    safetensors_file.write_stream(tmp_path / "a", NAMED, arrays())
    assert len(made) == len(NAMED)
    same(safetensors_file.read(tmp_path / "a"), NAMED)


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ([], "half never came"),
        ([("half", np.zeros(4, np.float16))], r"half is float16\(4,\)"),
        ([("half", np.zeros(5, np.float32))], r"half is float32\(5,\)"),
        ([("half", NAMED["half"]), ("half", NAMED["half"])], "half is not announced"),
        ([("other", NAMED["half"])], "other is not announced"),
    ],
)
def test_a_stream_that_is_not_as_announced_leaves_the_old_file(tmp_path, arrays, complaint):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(ValueError, match=complaint):
        safetensors_file.write_stream(tmp_path / "a", {"half": NAMED["half"]}, arrays)
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_dtype_that_the_format_lacks(tmp_path):
    with pytest.raises(ValueError, match="w: safetensors has no dtype complex128"):
        safetensors_file.write(tmp_path / "a", {"w": np.zeros(1, complex)})


DATA = bytes(range(16))
LIES = {
    "header longer than the file": ({"a": entry()}, DATA, 10**6),
    "header of 2**63": ({"a": entry()}, DATA, 2**63),
    "no JSON": (b"{{", b"", None),
    "no text": (b"\xff\xfe", b"", None),
    "deep": (b"[" * 200_000, b"", None),
    "no object": ([1], b"", None),
    "name twice": (b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), DATA, None),
    "field twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}', DATA,
                    None),
    "unknown dtype": ({"a": entry(dtype="F4")}, DATA, None),
    "dtype of a list": ({"a": entry(dtype=["F32"])}, DATA, None),
    "shape larger than the data": ({"a": entry(shape=(5,))}, DATA, None),
    "shape smaller": ({"a": entry(shape=(3,))}, DATA, None),
    "product overflows": ({"a": entry(shape=(2**32, 2**32))}, DATA, None),
    "product overflows to 0": ({"a": entry(0, 0, (2**32, 2**32))}, b"", None),
    "empty but absurd": ({"a": entry(0, 0, (0, 2**62))}, b"", None),
    "negative size": ({"a": entry(shape=(-1, -4))}, DATA, None),
    "size of text": ({"a": entry(shape=("4",))}, DATA, None),
    "size of a fraction": ({"a": entry(shape=(4.0,))}, DATA, None),
    "size of true": ({"a": entry(0, 4, (True,))}, DATA[:4], None),
    "rank": ({"a": entry(0, 4, (1,) * 70)}, DATA[:4], None),
    "beyond the file": ({"a": entry(16, 32)}, DATA, None),
    "backwards": ({"a": entry(16, 0)}, DATA, None),
    "negative offset": ({"a": entry(-16, 0)}, DATA, None),
    "overlap": ({"a": entry(0, 16), "b": entry(8, 24)}, DATA * 2, None),
    "same place": ({"a": entry(), "b": entry()}, DATA, None),
    "gap": ({"a": entry(0, 8, (2,)), "b": entry(12, 16, (1,))}, DATA, None),
    "gap at the start": ({"a": entry(4, 16, (3,))}, DATA, None),
    "more data": ({"a": entry()}, DATA + b"x", None),
    "less data": ({"a": entry()}, DATA[:-1], None),
    "missing field": ({"a": {"dtype": "F32", "shape": [4]}}, DATA, None),
    "more fields": ({"a": entry(more=1)}, DATA, None),
    "entry of text": ({"a": "F32"}, DATA, None),
    "offsets of three": ({"a": {**entry(), "data_offsets": [0, 16, 32]}}, DATA, None),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_are_refused(tmp_path, lie):
    path = raw(tmp_path / "model.safetensors", *LIES[lie])
    for reader in (safetensors_file.read, files.open_state_dict):
        with pytest.raises(ValueError, match=r"model\.safetensors: "):
            reader(path)


def test_lies_are_told_apart(tmp_path, monkeypatch):
    complaints = {
        "gap": "the data of 'b' follows a gap",
        "overlap": "the data of 'b' overlaps the one before",
        "shape larger than the data": "'a' takes 16 bytes, not the 20 of its shape",
        "unknown dtype": "'a' has dtype 'F4'; known are BOOL, U8",
        "header longer than the file": "a safetensors header of 1000000 bytes in a file of",
        "more data": "its tensors end at byte",
        "name twice": "'a' stands there twice",
    }
    for lie, complaint in complaints.items():
        with pytest.raises(ValueError, match=complaint):
            safetensors_file.read(raw(tmp_path / "a", *LIES[lie]))
    good = raw(tmp_path / "a", {"a": entry()}, DATA)
    monkeypatch.setattr(safetensors_file, "MAX_HEADER", 20)
    with pytest.raises(ValueError, match="a safetensors header of"):
        safetensors_file.read(good)


def test_a_good_header_by_hand(tmp_path):
    header = {"__metadata__": {"a": "b"}, "b": entry(8, 16, (2,)), "a": entry(0, 8, (1, 2))}
    read = safetensors_file.read(raw(tmp_path / "a", header, DATA))
    assert list(read) == ["b", "a"]
    assert np.asarray(read["a"]).tobytes() == DATA[:8]


def test_metadata_that_is_no_text(tmp_path):
    path = raw(tmp_path / "a", {"__metadata__": {"a": [1]}})
    with pytest.raises(ValueError, match="a: its __metadata__ is not text"):
        safetensors_file.metadata(path)


# --- shards ---------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """Two shards and their index, in a folder of a folder."""
    folder = tmp_path / "unet"
    folder.mkdir()
    half = len(NAMED) // 2
    parts = {"one": dict(list(NAMED.items())[:half]), "two": dict(list(NAMED.items())[half:])}
    for file, arrays in parts.items():
        safetensors.numpy.save_file(arrays, folder / file)
    index(folder, {name: file for file, arrays in parts.items() for name in arrays})
    return folder


def index(folder, weight_map) -> None:
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(content))


def weight_map(folder) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def test_shards(folder):
    same(shards.read(folder / INDEX, safetensors_file.read), NAMED)
    found, info = files.open_state_dict(folder / INDEX)
    same(found, NAMED)
    assert info.format == "safetensors"
    variant = folder / "model.safetensors.index.fp16.json"
    (folder / INDEX).rename(variant)
    same(files.open_state_dict(variant)[0], NAMED)


@pytest.mark.torch
def test_shards_of_torch_files(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin")
    torch.save({"b": torch.zeros(2)}, tmp_path / "y.bin")
    path = tmp_path / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "x.bin", "b": "y.bin"}}))
    found, info = files.open_state_dict(path)
    assert (np.asarray(found["a"]).tolist(), np.asarray(found["b"]).tolist()) == ([1, 1], [0, 0])
    assert info.format == "torch"
    safetensors_file.write(tmp_path / "y.bin", {"b": np.zeros(2)})
    with pytest.raises(ValueError, match="formats"):
        files.open_state_dict(path)


@pytest.mark.parametrize(
    "name", ["../one", "..", ".", "", "a/../one", "/etc/passwd", "sub\\one", "C:one", "one\0"]
)
def test_an_index_reaches_no_file_outside_of_its_folder(folder, name):
    (folder.parent / "one").write_bytes((folder / "one").read_bytes())
    index(folder, {k: name if v == "one" else v for k, v in weight_map(folder).items()})
    with pytest.raises(ValueError, match=r"index\.json: it names the file"):
        shards.read(folder / INDEX, safetensors_file.read)


def test_shards_that_are_links(folder):
    """Onto another disk, and in a cache of the Hugging Face hub."""
    secret = folder.parent / "secret"
    (folder / "one").rename(secret)
    (folder / "one").symlink_to(secret)
    same(shards.read(folder / INDEX, safetensors_file.read), NAMED)
    secret.rename(folder.parent / "moved")
    with pytest.raises(FileNotFoundError, match=r"one \(a link to .*secret\) is missing"):
        shards.read(folder / INDEX, safetensors_file.read)
    (folder.parent / "moved").rename(secret)
    snapshot = folder.parent / "models--x" / "snapshots" / "abc" / "unet"
    blobs = folder.parent / "models--x" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    secret.rename(blobs / "1")
    for name, blob in (("two", "2"), (INDEX, "3")):
        (folder / name).rename(blobs / blob)
    for name, blob in (("one", "1"), ("two", "2"), (INDEX, "3")):
        (snapshot / name).symlink_to(f"../../../blobs/{blob}")
    same(shards.read(snapshot / INDEX, safetensors_file.read), NAMED)


def test_index_and_shards_that_disagree(folder):
    places = weight_map(folder)
    cases = {
        "two lacks new": {**places, "new": "two"},
        "one lacks bool": {**places, "bool": "one"},
        "two also holds bool": {k: v for k, v in places.items() if k != "bool"},
    }
    for complaint, changed in cases.items():
        index(folder, changed)
        with pytest.raises(ValueError, match=complaint):
            shards.read(folder / INDEX, safetensors_file.read)
    (folder / "copy").write_bytes((folder / "one").read_bytes())
    index(folder, {**places, "conv.weight": "copy"})  # in two shards
    with pytest.raises(ValueError, match="copy also holds"):
        shards.read(folder / INDEX, safetensors_file.read)
    index(folder, {**places, "w": "gone"})
    with pytest.raises(FileNotFoundError, match="gone is missing"):
        shards.read(folder / INDEX, safetensors_file.read)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000,
     '{"weight_map": {"a": "one", "a": "two"}}'],
)  # fmt: skip
def test_an_index_that_is_none(folder, content):
    (folder / INDEX).write_text(content)
    with pytest.raises(ValueError, match=INDEX):
        shards.read(folder / INDEX, safetensors_file.read)


# --- what people have instead ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"\n<html>", "a web page"),
        (b"\x1f\x8b\x08\x00" + bytes(20), "gzip"),
        (b"GIF89a" + bytes(20), "neither a PyTorch file, nor safetensors, nor Flax msgpack"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, content, what):
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.ckpt: .*" + what):
        files.open_state_dict(tmp_path / "model.ckpt")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError):
        files.open_state_dict(tmp_path)
    with pytest.raises(ValueError, match="neither a zip archive nor a legacy file"):
        torch_file.read(raw(tmp_path / "a", {}))
