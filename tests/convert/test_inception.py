"""Files with Inception weights: the right one, the wrong one, none."""

import hashlib

import numpy as np
import pytest

from ldm_jax.convert import inception, table
from ldm_jax.convert.formats import torch_writer

DIGEST = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


@pytest.fixture(scope="module")
def arrays():
    """Names and shapes of the published file, every number a count."""
    shapes = inception.shapes()
    names = table.to_torch(inception.entries(shapes), shapes)
    return {name: np.full(x.shape, i, np.float32) for i, (name, x) in enumerate(names.items())}


def test_the_published_file_is_read_with_its_hash(tmp_path, arrays):
    counters = {"Conv2d_1a_3x3.bn.num_batches_tracked": np.int64(3)}
    path = tmp_path / "weights.pth"
    torch_writer.write(path, {**arrays, **counters})
    params, digest = inception.load(path)
    names = list(arrays)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert params["fc"]["kernel"].shape == (2048, 1008)
    variance = params["Mixed_6d"]["branch1x1"]["bn"]["var"]
    assert np.unique(variance) == names.index("Mixed_6d.branch1x1.bn.running_var")


@pytest.mark.parametrize("path", ["", "nothing.pth"])
def test_a_missing_file_says_which_is_wanted(tmp_path, path):
    with pytest.raises(FileNotFoundError, match=f"pt_inception-2015-12-05.*{DIGEST}"):
        inception.load(str(tmp_path / path) if path else "")


def test_the_inception_of_torchvision_is_refused(tmp_path, arrays):
    other = {**arrays, "fc.weight": np.zeros((1000, 2048), np.float32)}
    torch_writer.write(tmp_path / "inception_v3_google.pth", other)
    with pytest.raises(ValueError, match=r"google.pth.*fc.weight is \(1000, 2048\).*torchvision"):
        inception.load(tmp_path / "inception_v3_google.pth")


def test_a_damaged_file_is_refused(tmp_path, arrays):
    name = "Mixed_7c.branch_pool.conv.weight"
    bad = {**arrays, name: np.full_like(arrays[name], np.nan)}
    torch_writer.write(tmp_path / "weights.pth", bad)
    with pytest.raises(ValueError, match=f"{name} is not finite"):
        inception.load(tmp_path / "weights.pth")
