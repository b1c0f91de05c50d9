"""Files with changed bytes: the right tensors, or a ValueError that names the file; never more."""

import io
import pickle
import random
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ldm_jax.convert.formats import files, safetensors_file

WEIGHTS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.array([1, 2], np.float16),
    "c": np.array(0.5, ml_dtypes.bfloat16),
    "ids": np.arange(3),
}
MEMORY = 32 * 2**20  # bytes: what reading a file of 2 kB may take
WORK = 20.0  # seconds of a processor, as in `bounded`: a hundred times what any edit takes
FUZZ = settings(
    deadline=None,
    database=None,
    derandomize=True,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "flip", "cut", "insert", "copy", "number"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 2**64 - 1),
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits) -> bytes:
    """Each edit acts at a fraction of the length."""
    out = bytearray(content)
    for kind, where, value in edits:
        at = int(where * len(out))
        if kind == "set" and out:
            out[at] = value % 256
        elif kind == "flip" and out:
            out[at] ^= 1 << value % 8
        elif kind == "cut":
            del out[at : at + value % 64]
        elif kind == "insert":
            out[at:at] = random.Random(value).randbytes(value % 9)
        elif kind == "copy":
            out[at:at] = out[value % (len(out) + 1) :][:50]
        elif kind == "number":
            width = (1, 2, 4, 8)[value % 4]
            out[at : at + width] = (value >> 3).to_bytes(8, "little")[:width]
    return bytes(out)


def torch_bytes(**options) -> bytes:
    torch = pytest.importorskip("torch")
    named = {
        name: torch.from_numpy(x.astype(np.float32)).to(getattr(torch, str(x.dtype)))
        for name, x in WEIGHTS.items()
    }
    out = io.BytesIO()
    torch.save({"epoch": 1, "state_dict": named}, out, **options)
    return out.getvalue()


def safetensors_bytes(path: Path) -> bytes:
    safetensors_file.write(path, WEIGHTS, {"format": "pt"})
    return path.read_bytes()


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("good")
    return {
        "safetensors": safetensors_bytes(folder / "a"),
        "msgpack": serialization.msgpack_serialize(WEIGHTS),
    }


@pytest.fixture(scope="module")
def good_torch() -> dict[str, bytes]:
    return {
        "zip": torch_bytes(),
        "zip, protocol 4": torch_bytes(pickle_protocol=4),
        "legacy": torch_bytes(_use_new_zipfile_serialization=False),
    }


def outcome(path: Path, content: bytes) -> dict[str, np.ndarray] | None:
    """Its tensors, or None if it is refused as a bad file should be."""
    path.write_bytes(content)
    began = time.process_time()
    tracemalloc.start()
    read, refusal = None, str(path)
    try:
        read = {name: np.asarray(x) for name, x in files.open_state_dict(path)[0].items()}
    except ValueError as error:
        refusal = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY
    assert time.process_time() - began < WORK
    assert refusal.startswith(str(path))
    assert len(refusal) < 2000
    assert read is None or sum(x.nbytes for x in read.values()) <= 8 * len(content)
    return read


def equal(read, wanted=WEIGHTS) -> bool:
    return set(read) == set(wanted) and all(
        read[k].dtype == x.dtype and read[k].tobytes() == x.tobytes() for k, x in wanted.items()
    )


@pytest.mark.parametrize("kind", ["safetensors", "msgpack"])
@FUZZ
@given(edits=EDITS)
def test_edited_files(tmp_path, good, kind, edits):
    """These formats have no checksum: other numbers or names are possible, other kinds are not."""
    assert equal(outcome(tmp_path / "a", good[kind]))
    outcome(tmp_path / "a", edited(good[kind], edits))


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["zip", "zip, protocol 4"])
@FUZZ
@given(edits=EDITS)
def test_edited_zip_files_are_right_or_refused(tmp_path, good_torch, kind, edits):
    assert equal(outcome(tmp_path / "a", good_torch[kind]))
    read = outcome(tmp_path / "a", edited(good_torch[kind], edits))
    assert read is None or equal(read)


@pytest.mark.torch
@FUZZ
@given(edits=EDITS)
def test_edited_legacy_files(tmp_path, good_torch, edits):
    assert equal(outcome(tmp_path / "a", good_torch["legacy"]))
    outcome(tmp_path / "a", edited(good_torch["legacy"], edits))


@FUZZ
@given(
    content=st.binary(max_size=300), head=st.sampled_from([b"", b"\x80\x02", b"PK\3\4", b"\x82"])
)
@example(content=b"", head=b"PK\3\4")
def test_any_bytes(tmp_path, content, head):
    assert not outcome(tmp_path / "a", head + content)


@FUZZ
@given(content=st.lists(st.sampled_from(
    [b"(", b")", b"]", b"}", b"0", b"1", b"2", b"N", b"a", b"e", b"s", b"u", b"t", b"\x85", b"\x86",
     b"\x87", b"R", b"\x81", b"\x92", b"\x93", b"o", b"b", b"Q", b"l", b"d", b"\x8f", b"\x90",
     b"\x91", b"\x94", b"q\0", b"h\0", b"K\1", b"J\xff\xff\xff\xff", b"X\1\0\0\0a",
     b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nSize\n",
     b"ctorch\nFloatStorage\n", b"cbuiltins\nset\n", b"cx\nY\n", b"(iposix\nsystem\n"]
), max_size=60))  # fmt: skip
def test_any_opcodes(tmp_path, content):
    """A pickle of any order of opcodes, in a legacy file, whose pickles have no checksum."""
    legacy = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {}))
    keys = pickle.dumps([], 2)
    assert not outcome(tmp_path / "a", legacy + b"".join(content) + b"." + keys)


# --- memory ---------------------------------------------------------------------------------------

READ_ALL = """
import resource, sys
import numpy as np
from ldm_jax.convert.formats import files, torch_file
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found, _ = files.open_state_dict(sys.argv[1])
before = peak()
total = 0.0
for x in found.values():
    total += float(np.asarray(x)[0, 0])
assert total == len(found) * (len(found) - 1) / 2, total
print(peak() - before, sum(x.nbytes for x in found.values()) // 1024)
"""


def grown_by_reading(path: Path) -> tuple[int, int]:
    """kB of memory, and of tensors read one after another in a process of its own."""
    command = [sys.executable, "-c", READ_ALL, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    grown, total = map(int, done.stdout.split())
    return grown, total


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux alone")
def test_no_tensor_stays_in_memory(tmp_path):
    """A file of 300 MB, read tensor by tensor, takes the memory of one tensor."""
    count, mb = 30, 10
    specs = {f"w{i}": np.empty((mb * 256, 1024), np.float32) for i in range(count)}
    arrays = ((name, np.full_like(x, i)) for i, (name, x) in enumerate(specs.items()))
    safetensors_file.write_stream(tmp_path / "a", specs, arrays)
    grown, total = grown_by_reading(tmp_path / "a")
    assert total == count * mb * 1024
    assert grown < 2 * mb * 1024


@pytest.mark.torch
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux alone")
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_no_tensor_of_torch_stays_in_memory(tmp_path, new):
    torch = pytest.importorskip("torch")
    named = {f"w{i}": torch.full((2560, 1024), float(i)) for i in range(8)}
    torch.save({"state_dict": named}, tmp_path / "a", _use_new_zipfile_serialization=new)
    grown, total = grown_by_reading(tmp_path / "a")
    assert total == 80 * 1024
    assert grown < 20 * 1024
