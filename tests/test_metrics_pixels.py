"""PSNR and SSIM against scikit-image, and by hand."""

import jax
import numpy as np
import pytest
from skimage import metrics

from ldm_jax.metrics import pixels

PSNR = jax.jit(pixels.psnr)
SSIM = jax.jit(pixels.ssim, static_argnames="gaussian")
RNG = np.random.default_rng(0)


def images(kind, channels=3):
    """Two batches of pixels: alike, unlike, flat (where rounding is largest), nearly flat."""
    real = RNG.integers(0, 256, (2, 24, 31, channels)).astype(np.float32)
    other = {
        "alike": np.clip(np.rint(real + RNG.normal(0, 8, real.shape)), 0, 255),
        "unlike": RNG.integers(0, 256, real.shape),
        "flat": np.full(real.shape, 250.0),
    }
    if kind == "nearly flat":
        real = np.rint(240 + RNG.normal(0, 0.7, real.shape)).astype(np.float32)
        return real, real[:, ::-1].copy()
    return real, other[kind].astype(np.float32)


@pytest.mark.parametrize("kind", ["alike", "unlike", "flat", "nearly flat"])
@pytest.mark.parametrize("gaussian", [False, True])
def test_ssim_of_scikit_image(kind, gaussian):
    real, other = images(kind)
    options = {"gaussian_weights": True, "use_sample_covariance": False} if gaussian else {}
    expected = [
        metrics.structural_similarity(
            np.float64(a), np.float64(b), channel_axis=-1, data_range=255, **options
        )
        for a, b in zip(real, other)
    ]
    found = SSIM(real, other, gaussian=gaussian)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_psnr_of_scikit_image():
    real, other = images("alike")
    expected = [
        metrics.peak_signal_noise_ratio(np.float64(a), np.float64(b), data_range=255)
        for a, b in zip(real, other)
    ]
    np.testing.assert_allclose(PSNR(real, other), expected, rtol=1e-5)


def test_equal_images():
    real, _ = images("alike", channels=1)
    np.testing.assert_allclose(SSIM(real, real), 1, rtol=1e-6)
    assert np.all(np.isinf(PSNR(real, real)))


def test_images_below_the_window():
    small = np.zeros((1, 6, 9, 3), np.float32)
    with pytest.raises(ValueError, match="6x9 are smaller than the 7x7 window"):
        pixels.ssim(small, small)
