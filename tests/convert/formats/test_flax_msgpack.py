"""The msgpack reader against flax.serialization, and on trees that Flax does not write."""

import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization

from ldm_jax.convert.formats import files, flax_msgpack
from ldm_jax.convert.formats.tensors import LazyTensor

RNG = np.random.default_rng(0)
TREE = {
    "conv_in": {
        "kernel": RNG.normal(size=(3, 3, 4, 8)).astype(np.float32),
        "bias": RNG.normal(size=(8,)).astype(ml_dtypes.bfloat16),
    },
    "half": RNG.normal(size=(70_000,)).astype(np.float16),
    "scalar": np.array(2.5, np.float32),
    "numbers": {"step": 3, "large": 2**40, "low": -5, "rate": 0.5, "none": None, "yes": True},
    "list": {"0": np.arange(3), "1": np.array([True, False])},
    "empty": {},
    "no rows": np.zeros((0, 4), np.float32),
    "x" * 300: np.array(7, np.uint8),
    **{f"layer_{i}": {"scale": np.full(2, i, np.float32)} for i in range(20)},
}


def same(ours, theirs) -> None:
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs)
        for name in theirs:
            same(ours[name], theirs[name])
    elif isinstance(theirs, np.ndarray):
        assert isinstance(ours, LazyTensor)
        ours = np.asarray(ours)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.tobytes() == theirs.tobytes()
    else:
        assert ours == theirs


def test_flax_s_trees_are_read(tmp_path):
    (tmp_path / "a").write_bytes(serialization.msgpack_serialize(TREE))
    same(
        flax_msgpack.read(tmp_path / "a"),
        serialization.msgpack_restore((tmp_path / "a").read_bytes()),
    )


def test_arrays_that_flax_cut_into_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 1000)
    content = serialization.msgpack_serialize(TREE)
    assert flax_msgpack.CHUNKED.encode() in content
    (tmp_path / "a").write_bytes(content)
    same(flax_msgpack.read(tmp_path / "a"), TREE)


def test_numpy_scalars_and_complex_numbers(tmp_path):
    tree = {"a": np.float32(1.5), "b": np.int64(3), "c": 1j}
    (tmp_path / "a").write_bytes(serialization.msgpack_serialize(tree))
    assert flax_msgpack.read(tmp_path / "a") == {"a": 1.5, "b": 3, "c": None}


def test_as_a_flat_state_dict(tmp_path):
    (tmp_path / "a").write_bytes(serialization.msgpack_serialize(TREE))
    found, info = files.open_state_dict(tmp_path / "a")
    assert (info.format, len(info.left)) == ("msgpack", 6)
    assert np.asarray(found["layer_3/scale"]).tolist() == [3, 3]
    assert "numbers/step" in info.left


def test_a_name_in_two_places_is_refused(tmp_path):
    tree = {"a": {"b": np.ones(1)}, "a/b": np.zeros(1)}
    for twice in (tree, dict(reversed(tree.items()))):
        (tmp_path / "x").write_bytes(serialization.msgpack_serialize(twice))
        with pytest.raises(ValueError, match="x: 'a/b' stands there twice"):
            files.open_state_dict(tmp_path / "x")


def array(shape=(2,), dtype="float32", data=bytes(8), kind=1):
    inner = msgpack.packb((shape, dtype, data), use_bin_type=True)
    return msgpack.ExtType(kind, inner)


LIES = {
    "data shorter than the shape": {"w": array(shape=(3,))},
    "data longer": {"w": array(shape=(1,))},
    "absurd shape": {"w": array(shape=(2**40, 2**40))},
    "empty but absurd": {"w": array(shape=(0, 2**62), data=b"")},
    "negative shape": {"w": array(shape=(-1, -2))},
    "shape of text": {"w": array(shape=("2",))},
    "shape of a number": {"w": array(shape=2)},
    "unknown dtype": {"w": array(dtype="object")},
    "dtype of Python code": {"w": array(dtype="(2,)f4,O")},
    "dtype of a number": {"w": array(dtype=4)},
    "unknown extension": {"w": array(kind=9)},
    "extension that is no array": {"w": msgpack.ExtType(1, b"\x93")},
    "bytes": {"w": bytes(100_000)},
    "text": {"w": "x" * 100_000},
    "a list as a tree": [1, 2],
    "chunks of text": {"w": {flax_msgpack.CHUNKED: True, "shape": {"0": 2}, "chunks": {"0": "x"}}},
    "chunks that miss": {"w": {flax_msgpack.CHUNKED: True, "shape": {"0": 3},
                               "chunks": {"0": array()}}},
    "no chunks": {"w": {flax_msgpack.CHUNKED: True, "shape": {"0": 0}, "chunks": {}}},
    "chunks of two dtypes": {"w": {flax_msgpack.CHUNKED: True, "shape": {"0": 4}, "chunks": {
        "0": array(), "1": array(dtype="int32")}}},
}  # fmt: skip
BYTES = {
    "map of 2**32": b"\xdf\xff\xff\xff\xff",
    "list of 2**32": b"\x81\xa1a\xdd\xff\xff\xff\xff",
    "text of 2**32": b"\x81\xa1a\xdb\xff\xff\xff\xff",
    "extension of 2**32": b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
    "name twice": b"\x82\xa1a\x01\xa1a\x02",
    "name of a list": b"\x81\x90\x01",
    "deep": b"\x81\xa1a" + b"\x91" * 10_000 + b"\x01",
    "arrays as shapes of arrays": b"\x81\xa1a"
    + b"\xc9\x00\x00\xff\xff\x01\x93" * 5000
    + bytes(9**5),
    "unused byte": b"\x81\xa1a\xc1",
    "no UTF-8": b"\x81\xa1\xff\x01",
    "more data": b"\x81\xa1a\x01\x01",
    "less": b"\x81\xa1a",
}


@pytest.mark.parametrize("lie", [*LIES, *BYTES])
def test_lies_are_refused(tmp_path, lie):
    path = tmp_path / "flax_model.msgpack"
    content = BYTES[lie] if lie in BYTES else msgpack.packb(LIES[lie], use_bin_type=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"flax_model\.msgpack: "):
        files.open_state_dict(path)


def test_every_truncation_is_refused(tmp_path):
    tree = {"a": {"b": np.arange(3, dtype=np.float32)}, "c": {"d": np.ones(2, np.float16)}}
    whole = serialization.msgpack_serialize(tree)
    for length in range(len(whole)):
        (tmp_path / "a").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="a: "):
            flax_msgpack.read(tmp_path / "a")
