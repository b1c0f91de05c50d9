"""Files in the format of `torch.save`, read by torch and by our own reader."""

import ml_dtypes
import numpy as np
import pytest
from reference import draw

from ldm_jax.convert.formats import torch_file, torch_writer

ARRAYS = {
    "model.weight": draw(3, 4, 2, 1),
    "model.transposed": draw(4, 3).T,
    "model.half": draw(5).astype(np.float16),
    "model.brain": draw(2, 3).astype(ml_dtypes.bfloat16),
    "model.scalar": np.float32(0.5),
    "model.empty": draw(0, 3),
    "model.ids": np.arange(3, dtype=np.int64),
    "model.näme": draw(1),
}


def test_our_reader_reads_it(tmp_path):
    torch_writer.write(tmp_path / "x.ckpt", ARRAYS)
    found = torch_file.read(tmp_path / "x.ckpt")["state_dict"]
    assert list(found) == list(ARRAYS)
    for name, x in ARRAYS.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(np.asarray(found[name]), x)


@pytest.mark.torch
def test_torch_reads_it(tmp_path):
    import torch

    torch_writer.write(tmp_path / "x.ckpt", ARRAYS)
    found = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert list(found) == list(ARRAYS)
    for name, x in ARRAYS.items():
        assert str(found[name].dtype) == f"torch.{x.dtype}"
        np.testing.assert_array_equal(found[name].float().numpy(), x.astype(np.float32))
    assert found["model.transposed"].stride() == (4, 1)


def test_a_failure_leaves_the_older_file(tmp_path):
    class Broken:
        shape, dtype = (2,), np.dtype(np.float32)

        def __array__(self, dtype=None, copy=None):
            raise OSError("gone")

    torch_writer.write(tmp_path / "x.ckpt", {"a": draw(1)})
    before = (tmp_path / "x.ckpt").read_bytes()
    with pytest.raises(OSError, match="gone"):
        torch_writer.write(tmp_path / "x.ckpt", {"a": draw(1), "b": Broken()})
    assert (tmp_path / "x.ckpt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.ckpt"]


def test_a_type_that_torch_lacks_here(tmp_path):
    with pytest.raises(ValueError, match="a: dtype complex64 is not one of float32"):
        torch_writer.write(tmp_path / "x.ckpt", {"a": np.zeros(1, np.complex64)})
    assert not (tmp_path / "x.ckpt").exists()


def test_large_numbers():
    assert torch_writer._int(2**31 - 1) == b"J\xff\xff\xff\x7f"
    assert torch_writer._int(2**31) == b"\x8a\x05\x00\x00\x00\x80\x00"
