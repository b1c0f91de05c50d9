"""PSNR and SSIM of images against their originals, and measures of sharpness.

Images are float32 pixels [B, H, W, c] in 0..255; there is one value per image.
"""

import jax
import jax.numpy as jnp
import numpy as np

RANGE = 255.0


def psnr(real: jax.Array, other: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio [B] in dB; infinite for equal images."""
    mse = jnp.mean(jnp.square((real - other) / RANGE), axis=(1, 2, 3))
    return -10 * jnp.log10(mse)


def ssim(real: jax.Array, other: jax.Array, *, gaussian: bool = False) -> jax.Array:
    """Structural similarity [B], the mean over positions and channels (Wang et al. 2004, eq. 13).

    By default scikit-image's: windows of 7x7, unbiased covariances. With `gaussian` as in the
    paper: a Gaussian window of 11x11 with sigma 1.5, biased covariances. Positions whose window
    leaves the image are left out. ValueError if the images are smaller than a window.
    """
    window = _gaussian_window() if gaussian else np.full(7, 1 / 7)
    side = len(window)
    if min(real.shape[1:3]) < side:
        raise ValueError(
            f"images of {real.shape[1]}x{real.shape[2]} are smaller than the {side}x{side} window"
            " of SSIM"
        )
    factor = 1.0 if gaussian else side**2 / (side**2 - 1)  # scikit-image's unbiased covariances
    # Covariances do not change under a shift, and float32 keeps their digits only near zero.
    shift_x, shift_y = (jnp.mean(i / RANGE, axis=(1, 2), keepdims=True) for i in (real, other))
    x, y = real / RANGE - shift_x, other / RANGE - shift_y
    mean_x, mean_y = _blur(x, window), _blur(y, window)
    var_x = factor * (_blur(x * x, window) - mean_x**2)
    var_y = factor * (_blur(y * y, window) - mean_y**2)
    cov = factor * (_blur(x * y, window) - mean_x * mean_y)
    mean_x, mean_y = mean_x + shift_x, mean_y + shift_y
    c1, c2 = 0.01**2, 0.03**2  # (K L)^2 of the paper, for values in 0..1
    same = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    return jnp.mean(same / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)), axis=(1, 2, 3))


def _gaussian_window() -> np.ndarray:
    at = np.arange(-5, 6)
    weights = np.exp(-0.5 * (at / 1.5) ** 2)
    return weights / weights.sum()


def _blur(x: jax.Array, window: np.ndarray) -> jax.Array:
    """Mean under the window at every position where it fits, along height, then width."""
    kernel = jnp.asarray(window, x.dtype)
    for axis in (1, 2):
        count = x.shape[axis] - len(window) + 1
        x = sum(
            kernel[i] * jax.lax.slice_in_dim(x, i, i + count, axis=axis) for i in range(len(window))
        )
    return x


def gradient_energy(image: jax.Array) -> jax.Array:
    """Mean squared difference of neighbours [B], that along height plus that along width."""
    along = [jnp.mean(jnp.square(jnp.diff(image, axis=axis)), axis=(1, 2, 3)) for axis in (1, 2)]
    return along[0] + along[1]


def fine_power(image: jax.Array) -> jax.Array:
    """Mean power per pixel [B] above half of the Nyquist frequency, along height or width.

    This is the part lost when the side is halved: 0.25 cycles per pixel and more in either
    direction. A Hann window suppresses the step between opposite edges; its power is divided out.
    ValueError if the images are smaller than 4 pixels.
    """
    height, width = image.shape[1:3]
    if min(height, width) < 4:
        raise ValueError(f"images of {height}x{width} are too small for a spectrum: 4 or more")
    window = (_hann(height)[:, None] * _hann(width))[None, :, :, None]
    # The mean is by far the largest coefficient; its rounding errors would cover the others.
    image = image - jnp.mean(image, axis=(1, 2), keepdims=True)
    spectrum = jnp.fft.fft2(image * window, axes=(1, 2), norm="forward")
    fine = [np.abs(np.fft.fftfreq(n)) >= 0.25 for n in (height, width)]
    fine = (fine[0][:, None] | fine[1])[None, :, :, None]
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    total = jnp.mean(jnp.sum(power * fine, axis=(1, 2)), axis=-1)
    return total / np.mean(np.square(window))


def _hann(count: int) -> np.ndarray:
    """Periodic Hann window: a whole number of cycles leaves all but three coefficients at 0."""
    return np.float32(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(count) / count))
