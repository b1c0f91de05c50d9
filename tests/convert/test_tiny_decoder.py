"""TAESD's decoder against diffusers, from files of either spelling."""

import numpy as np
import pytest

from ldm_jax.convert import tiny_decoder
from ldm_jax.convert.formats import safetensors_file

torch = pytest.importorskip("torch", reason="diffusers is the reference, and needs torch")
diffusers = pytest.importorskip("diffusers", reason="is the reference")
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    wide = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    return diffusers.AutoencoderTiny(**wide).eval()


def own(reference):
    """{name: array} as TAESD's repository spells the decoder."""
    tensors = reference.decoder.state_dict()
    names = (name.removeprefix("layers.").partition(".") for name in tensors)
    renamed = [f"{int(number) + 1}.{rest}" for number, _, rest in names]
    return dict(zip(renamed, (x.numpy() for x in tensors.values()), strict=True))


@pytest.mark.parametrize("spelling", ["folder", "file"])
def test_images_are_those_of_diffusers(reference, spelling, tmp_path):
    if spelling == "folder":
        reference.save_pretrained(tmp_path)
        path = tmp_path
    else:
        path = tmp_path / "taesd_decoder.safetensors"
        safetensors_file.write(path, own(reference))
    net, params = tiny_decoder.load(path)
    z = np.float32(2 * np.random.default_rng(0).normal(size=(2, 4, 3, 4)))
    made = net.apply({"params": params}, z)
    with torch.no_grad():
        wanted = reference.decode(torch.from_numpy(z.transpose(0, 3, 1, 2))).sample.numpy()
    assert made.shape == (2, 32, 24, 3)
    np.testing.assert_allclose(made, wanted.transpose(0, 2, 3, 1), atol=2e-6)


def test_other_files_are_refused(reference, tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors_file.write(path, {"x.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ValueError, match="is no decoder of TAESD"):
        tiny_decoder.load(path)
    tensors = own(reference)
    del tensors["3.conv.0.weight"]
    safetensors_file.write(path, tensors)
    with pytest.raises(ValueError, match=r"missing layers\.2\.conv\.0\.weight"):
        tiny_decoder.load(path)
