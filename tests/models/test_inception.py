"""Inception-v3 of FID against its PyTorch ports, with the same random weights."""

import jax
import numpy as np
import pytest
from reference import draw, nhwc, weight

from ldm_jax.convert import inception as convert
from ldm_jax.convert import table
from ldm_jax.models import inception

PIXELS = np.random.default_rng(0).integers(0, 256, (1, 3, 40, 64), dtype=np.uint8)
LAYERS = ("64", "192", "768", "2048", "spatial", "logits_unbiased", "logits")


@pytest.fixture(scope="module")
def weights():
    """A state dict as in the published file; convolutions keep the size of what goes through."""
    shapes = convert.shapes()
    torch = table.to_torch(convert.entries(shapes), shapes)
    found = {name: weight(name, tuple(x.shape)) for name, x in torch.items()}
    for name in found:
        if name.endswith("running_var"):
            found[name] = np.abs(found[name]) + 0.5
        elif name.endswith("conv.weight"):
            found[name] *= np.float32(2**0.5)
    return found


@pytest.fixture(scope="module")
def params(weights):
    shapes = convert.shapes()
    return table.from_torch(convert.entries(shapes), weights, shapes)


@pytest.fixture(scope="module")
def run(params):
    module = inception.InceptionV3()
    jitted = jax.jit(lambda params, x: module.apply({"params": params}, x))
    return lambda x: jitted(params, x)


def close(ours, theirs):
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(np.asarray(ours) / scale, theirs / scale, atol=1e-4)


@pytest.mark.torch
def test_every_layer_against_torch(weights, run):
    import inception_torch

    expected = inception_torch.features(weights, inception_torch.prepare(PIXELS, "torch_fidelity"))
    found = run(inception.prepare(nhwc(PIXELS).astype(np.float32)))
    assert set(found) == set(expected) == set(LAYERS)
    for name in LAYERS:
        assert found[name].shape == expected[name].shape
        close(found[name], expected[name])


@pytest.mark.torch
@pytest.mark.parametrize("how", ["torch_fidelity", "pytorch_fid"])
@pytest.mark.parametrize("size", [(40, 64), (299, 299), (512, 311)])
def test_preparation(how, size):
    import inception_torch

    x = np.random.default_rng(1).integers(0, 256, (1, 3, *size)).astype(np.uint8)
    expected = nhwc(inception_torch.prepare(x, how).numpy())
    found = inception.prepare(nhwc(x).astype(np.float32), how)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.torch
@pytest.mark.parametrize("size", [(40, 64), (1, 7)])
def test_resize_of_tensorflow_1(size):
    import inception_torch
    import torch

    x = draw(2, 3, *size)
    expected = inception_torch.tensorflow1_bilinear(torch.as_tensor(x), 299).numpy()
    found = inception.resize_like_tensorflow1(nhwc(x), 299)
    np.testing.assert_allclose(found, nhwc(expected), atol=1e-6)


def test_resize_of_tensorflow_1_by_hand():
    row = np.array([0.0, 10.0, 20.0, 40.0], np.float32).reshape(1, 1, 4, 1)
    # positions 0, 0.8, 1.6, 2.4, 3.2, of which the last lies beyond the last pixel
    wide = inception.resize_like_tensorflow1(np.repeat(row, 5, axis=1), 5)[0, 0, :, 0]
    np.testing.assert_allclose(wide, [0, 8, 16, 28, 40], rtol=1e-6)


def test_parameters_are_those_of_the_published_file():
    shapes = convert.shapes()
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))
    assert len(convert.entries(shapes)) == 94 * 5 + 2
    assert count == 23_885_392  # 95 541 568 bytes, of 95 628 359 in the file; the rest are names
