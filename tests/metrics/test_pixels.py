"""PSNR and SSIM against scikit-image, sharpness in closed form."""

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


def waves(*, low, high):
    """A long wave along width and a short one along height, of these amplitudes [1, 64, 32, 1]."""
    y, x = np.mgrid[:64, :32]
    long, short = np.cos(2 * np.pi * 3 * x / 32), np.cos(2 * np.pi * 20 * y / 64)
    return np.float32(127 + low * long + high * short)[None, :, :, None]


def test_fine_power_is_that_of_the_short_wave():
    # A wave of amplitude a has the power a^2 / 2 under any window that is divided out again.
    found = jax.jit(pixels.fine_power)(np.concatenate([waves(low=60, high=h) for h in (0, 2, 40)]))
    np.testing.assert_allclose(found, [0, 2, 800], rtol=1e-3, atol=1e-4)


def test_fine_power_of_a_ramp_is_not_that_of_its_edges():
    ramp = np.broadcast_to(np.arange(64, dtype=np.float32)[:, None, None], (1, 64, 64, 3))
    assert pixels.fine_power(ramp)[0] < 1e-4  # 10.7 without a window


def test_gradient_energy_of_waves():
    # Neighbours of a wave of f cycles per pixel differ by a wave of amplitude 2 a sin(pi f).
    whole = np.tile(waves(low=60, high=40), (1, 2, 2, 1))[
        :, :65, :33
    ]  # differences of whole periods
    squared = [(2 * a * np.sin(np.pi * f)) ** 2 / 2 for a, f in ((60, 3 / 32), (40, 20 / 64))]
    np.testing.assert_allclose(pixels.gradient_energy(whole), [sum(squared)], rtol=1e-3)


def test_spectra_of_too_few_pixels():
    with pytest.raises(ValueError, match="3x9 are too small for a spectrum"):
        pixels.fine_power(np.zeros((1, 3, 9, 3), np.float32))
