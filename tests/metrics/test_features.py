"""Features of streams of images: any mesh, any last batch, what the networks are handed."""

import numpy as np
import pytest
from PIL import Image
from recipes import mesh_of

from ldm_jax.metrics import features
from ldm_jax.models import inception
from ldm_jax.runtime import images

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (11, 16, 16, 3), dtype=np.uint8)
NETWORK = features.random_network()


def batches(pixels, size):
    for first in range(0, len(pixels), size):
        yield features.padded(pixels[first : first + size], size)


def extracted(pixels, mesh, size=4):
    parts = list(features.extract(NETWORK, mesh, batches(pixels, size)))
    return np.concatenate([part["features"] for part in parts])


@pytest.fixture(scope="module")
def one_device():
    return extracted(PIXELS, mesh_of())


@pytest.mark.parametrize("sizes", [{"data": 4}, {"data": 2, "fsdp": 2}])
def test_features_do_not_depend_on_the_mesh(one_device, sizes):
    assert one_device.shape == (11, 224)
    found = extracted(PIXELS, mesh_of(**sizes))
    np.testing.assert_allclose(found, one_device, rtol=1e-5, atol=1e-6)


def test_features_do_not_depend_on_the_batch(one_device):
    np.testing.assert_allclose(
        extracted(PIXELS, mesh_of(), size=8), one_device, rtol=1e-5, atol=1e-6
    )
    assert len(np.unique(one_device.round(5), axis=0)) == 11


def test_floats_are_rounded_as_files_are():
    image = RNG.uniform(-1.2, 1.2, (2, 4, 4, 3)).astype(np.float32)
    np.testing.assert_array_equal(features.to_pixels(image), images.to_uint8(image))
    back = PIXELS / np.float32(127.5) - 1
    np.testing.assert_array_equal(features.to_pixels(back), PIXELS)
    grey = features.to_pixels(PIXELS[..., :1])
    np.testing.assert_array_equal(grey, np.repeat(PIXELS[..., :1], 3, axis=-1))


@pytest.mark.parametrize("size", [(64, 48), (20, 31), (32, 32)])
def test_clip_sees_what_pil_makes(size):
    pixels = RNG.integers(0, 256, (1, *size, 3), dtype=np.uint8)
    found = features.prepare_clip(pixels.astype(np.float32), 32)
    short = min(size)
    shape = (int(32 * size[1] / short), int(32 * size[0] / short))  # as transformers cuts it
    expected = np.asarray(Image.fromarray(pixels[0]).resize(shape, Image.Resampling.BICUBIC))
    top, left = (expected.shape[0] - 32) // 2, (expected.shape[1] - 32) // 2
    expected = expected[top : top + 32, left : left + 32].astype(np.float32)
    assert np.abs(found[0] - expected).max() <= 1
    assert np.abs(found[0] - expected).mean() < 0.1


class Mean:
    """In place of CLIP: the mean of what it is handed."""

    image_size = 32

    def apply(self, params, images):
        return images.mean(axis=(1, 2)) * params["params"]


def test_clip_is_handed_normalized_images():
    mean, std = (0.5, 0.25, 0.5), (0.25, 0.5, 1)
    network = features.clip_network(Mean(), np.float32(2), "abc", mean, std)
    pixels = RNG.integers(0, 256, (2, 32, 32, 3)).astype(np.float32)
    expected = 2 * (pixels.mean(axis=(1, 2)) / 255 - np.array(mean)) / np.array(std)
    found = network.apply(network.params, pixels)["features"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_random_weights_are_the_same_everywhere():
    kernel = NETWORK.params["1"]["kernel"]
    assert kernel.shape == (3, 3, 32, 64)
    expected = np.random.default_rng(0).standard_normal(3 * 3 * 3 * 32 + 32 + 1)[-1]
    assert kernel.flat[0] == pytest.approx(expected * np.sqrt(2 / (9 * 32)), rel=1e-6)
    other = features.random_network(1)
    assert other.digest != NETWORK.digest
    assert other.name == "random features"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "512"}, "layer '512' is not one of 64, 192, 768, 2048"),
        ({"how": "clean"}, "preprocessing 'clean' is neither"),
    ],
)
def test_what_inception_does_not_have(options, message):
    with pytest.raises(ValueError, match=message):
        features.inception_network({}, "", **options)
    assert "2048" in inception.LAYERS
