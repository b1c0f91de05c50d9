"""Small files that ask for more work or memory than their size: each is refused, and soon.

The fuzz tests change bytes of good files; these are made by hand, one for each way to make little
be much: hashes and comparisons of nested tuples, equal hashes, texts and shapes used again and
again, names that grow, counts that are believed.
"""

import json
import pickle
import struct

import bounded
import numpy as np
import pytest

from ldm_jax.convert.formats import tensors, torch_file

HEAD = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {}))
KEYS = pickle.dumps([], 2)
PUSH = {"text": b"X" + struct.pack("<I", 300_000) + b"a" * 300_000, "set": b"cbuiltins\nset\n"}


def nested(depth=60, seed=b")"):
    """A tuple of twice a tuple of twice a tuple ...: 2**depth to hash, or to compare."""
    return seed + b"2\x86" * depth


def repeated(text: bytes, step: bytes, times: int) -> bytes:
    """A legacy file: `text` is remembered as number 0, and `step` done again and again."""
    return HEAD + b"\x80\x02" + text + b"q\x000" + step * times + b"}." + KEYS


def equal_tuples(count=40_000):
    """A dict whose keys are tuples of -1 and -2, which have one hash."""
    keys = (b"(" + b"".join(b"h\x01" if n >> bit & 1 else b"h\x00" for bit in range(16)) + b"tN"
            for n in range(count))  # fmt: skip
    numbers = b"J\xff\xff\xff\xffq\x000J\xfe\xff\xff\xffq\x010"
    return HEAD + b"\x80\x02" + numbers + b"}(" + b"".join(keys) + b"u." + KEYS


def equal_numbers(count=40_000):
    """Objects remembered under multiples of 2**61 - 1, which have one hash."""
    steps = b"".join(b"p%d\n" % (n * (2**61 - 1)) for n in range(1, count))
    return HEAD + b"\x80\x02N" + steps + b"0}." + KEYS


def one_dict_often(entries=50_000):
    keys = [b"J" + struct.pack("<i", n) for n in range(entries)]
    inner = b"}q\x00(" + b"".join(key + b"N" for key in keys) + b"u0"
    outer = b"".join(key + b"h\x00" for key in keys)
    return HEAD + b"\x80\x02" + inner + b"}(" + outer + b"u." + KEYS


def large_shape(digits=100_000, times=200):
    number = b"\x8b" + struct.pack("<i", digits) + b"\x7f" * digits
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0aX\x03\0\0\0cpuK\x04tQ"
    step = (b"ctorch._utils\n_rebuild_tensor_v2\n(h\x01K\0(" + b"h\x00" * 30 + b"t(" +
            b"K\x00" * 30 + b"t\x89NtR0")  # fmt: skip
    body = b"\x80\x02" + number + b"q\x000" + storage + b"q\x010" + step * times
    return HEAD + body + b"}." + pickle.dumps(["a"], 2) + struct.pack("<q", 4) + bytes(16)


def long_names(levels=20, leaves=50_000):
    """msgpack: maps in maps of names of 60 kB, and many leaves in the last."""
    name = b"\xda" + struct.pack(">H", 60_000) + b"n" * 60_000
    last = b"".join(b"\xa5%05d\x01" % n for n in range(leaves))
    return (b"\x81" + name) * levels + b"\xdf" + struct.pack(">I", leaves) + last


FILES = {
    "a hash of nested tuples": b"\x80\x02" + nested() + b"Q.",
    "nested tuples as keys": HEAD + b"\x80\x02}" + nested() + b"Ns." + KEYS,
    "lists of nested tuples": HEAD + b"\x80\x02}.\x80\x02](" + nested() + nested() + b"e.",
    "tuples of one hash": equal_tuples(),
    "numbers of one hash": equal_numbers(),
    "sets of a text": repeated(PUSH["text"], PUSH["set"] + b"h\x00\x85R0", 30_000),
    "sets of a list": repeated(b"](" + b"".join(b"J" + struct.pack("<i", n) for n in range(20_000))
                               + b"e", PUSH["set"] + b"h\x00\x85R0", 20_000),
    "sizes of a text": repeated(PUSH["text"], b"ctorch\nSize\nh\x00\x85R0", 30_000),
    "names that grow": repeated(b"cx\nY\n", b"cbuiltins\ngetattr\nh\x00X\xfa\0\0\0" + b"a" * 250
                                + b"\x86Rq\x000", 3000),
    "names of a text": repeated(PUSH["text"], b"h\x00h\x00\x930", 200_000),
    "a call of many arguments": repeated(b"(" + b"N" * 100_000 + b"t",
                                         b"c_codecs\nencode\nh\x00R0", 100_000),
    "one dict under many names": one_dict_often(),
    "shapes of long numbers": large_shape(),
    "names in names": long_names(),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": index.name}}))
    paths = [*(folder / name for name in FILES), index, "/dev/zero"]
    said = bounded.read_all(
        "from ldm_jax.convert.formats import files", "files.open_state_dict(path)", paths
    )
    return {path.rpartition("/")[2]: text for path, text in said.items()}


@pytest.mark.parametrize("name", [*FILES, "model.safetensors.index.json", "zero"])
def test_small_files_ask_for_little(outcomes, name):
    assert name in outcomes
    assert outcomes[name].startswith("/")  # the path, then what is wrong
    assert len(outcomes[name]) < 2000


def test_an_index_that_names_itself(outcomes):
    said = outcomes["model.safetensors.index.json"]
    assert "names model.safetensors.index.json, an index, not a file of tensors" in said


def test_names_are_counted_once(tmp_path):
    """Before, every number looked through all names: 1.8 thousand million steps for 60 000."""
    imports = "from ldm_jax.convert.compvis import single_file"
    read = "single_file._count({f'blocks.{i}.w': 0 for i in range(60_000)}, 'blocks.{}.')"
    assert bounded.read_all(imports, read, [tmp_path]) == {str(tmp_path): "read"}


def test_a_stride_of_one_element_does_not_count(tmp_path):
    """PyTorch writes any stride there, and NumPy has no strides of 2**70 bytes."""
    (tmp_path / "a").write_bytes(np.arange(6, dtype=np.float32).tobytes())
    file = tensors.file(tmp_path / "a")
    storage = torch_file.Storage(np.dtype(np.float32), 6, 0)
    x = torch_file._tensor(file, False, storage, 0, (3, 1, 2), (1, 2**61, 3))
    np.testing.assert_array_equal(np.asarray(x)[:, 0], [[0, 3], [1, 4], [2, 5]])
    for stride in ((1, 2**70, 3), (2**62, 1, 1)):
        with pytest.raises(ValueError, match="no sizes from 0"):
            torch_file._tensor(file, False, storage, 0, (3, 1, 2), stride)
