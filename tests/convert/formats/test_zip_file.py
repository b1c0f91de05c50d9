"""Archives that torch does not write: cut, lying, swapped."""

import pickle
import struct
import zipfile

import numpy as np
import pytest
from torch_files import NUMBERS, Pickle, one_tensor, save

from ldm_jax.convert.formats import torch_file


def good(path) -> bytes:
    one_tensor(path, (4,), (1,))
    return path.read_bytes()


def test_every_truncation_is_refused(tmp_path):
    whole = good(tmp_path / "a")
    for length in range(len(whole)):
        (tmp_path / "a").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a: "):
            torch_file.read(tmp_path / "a")


def test_zip64_as_large_files_have_it(tmp_path):
    path = tmp_path / "a"
    content = Pickle().tensor((4,), (1,)).done()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (("data.pkl", content), ("data/0", NUMBERS.tobytes())):
            with archive.open(f"archive/{name}", "w", force_zip64=True) as entry:
                entry.write(data)
    assert np.array_equal(torch_file.read(path), NUMBERS)
    data = path.read_bytes()  # the directory's own sizes as 64 bits too
    at = data.rindex(b"PK\5\6")
    _, _, _, here, count, size, start, _ = struct.unpack_from("<4s4H2IH", data, at)
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, here, count, size, start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, at, 1)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    path.write_bytes(data[:at] + end64 + locator + end)
    assert np.array_equal(torch_file.read(path), NUMBERS)
    path.write_bytes(data[:at] + end64 + end)
    with pytest.raises(ValueError, match="a: a zip64 archive without its locator"):
        torch_file.read(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_torch_does_not_write(tmp_path):
    content = Pickle().tensor((4,), (1,)).done()
    path = tmp_path / "a"

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match="a: .*" + match):
            torch_file.read(path)

    with zipfile.ZipFile(path, "w") as archive:
        for _ in range(2):
            archive.writestr("archive/data.pkl", content)
    refused("a duplicate entry")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", content * 100)
    refused("with compression")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.ckpt", content * 100)
    refused(r"unpack it .* it holds model\.ckpt")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "text")
    refused("0 data.pkl")
    save(path, content, {}, **{"constants.pkl": b"", "code/x.py": b""})
    refused("TorchScript")
    save(path, content, {})
    refused("storage '0' is missing")
    save(path, content, {"0": NUMBERS.tobytes()}, byteorder=b"middle")
    refused("byte order 'middle'")
    path.write_bytes(b"x" * 257 + b"ustar" + b"x" * 500)
    refused("tar archive")
    path.write_bytes(pickle.dumps({"w": 1}))
    refused("torch.save did not write")


@pytest.mark.parametrize("field", [16, 20, 24, 42])  # CRC, sizes, place of the directory's entry
def test_a_directory_that_lies(tmp_path, field):
    path = tmp_path / "a"
    whole = good(path)
    for entry in (whole.index(b"PK\1\2"), whole.rindex(b"PK\1\2")):
        for value in (0, 1, 7, 10**6, 2**32 - 2, 2**32 - 1):
            data = bytearray(whole)
            struct.pack_into("<I", data, entry + field, value)
            path.write_bytes(data)
            if data == whole or (field, value) == (16, 0):  # the truth, or no checksum
                assert np.array_equal(torch_file.read(path), NUMBERS)
            else:
                with pytest.raises(ValueError, match="a: "):
                    np.asarray(torch_file.read(path))


def test_a_directory_that_swaps_two_storages(tmp_path):
    content = Pickle().add(b"(").tensor((4,), (1,)).tensor((4,), (1,), key="1").add(b"t").done()
    path = save(tmp_path / "a", content, dict.fromkeys("01", NUMBERS.tobytes()))
    data = bytearray(path.read_bytes())
    ends = [data.rindex(f"archive/data/{key}".encode()) - 46 + 42 for key in "01"]
    first, second = (bytes(data[at : at + 4]) for at in ends)
    data[ends[0] : ends[0] + 4], data[ends[1] : ends[1] + 4] = second, first
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"a: entry 'archive/data/0' .* is not where the directory"
    ):
        torch_file.read(path)
