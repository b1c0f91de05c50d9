"""PSNR and SSIM of images against the images they stand for, one value per image.

Images are float32 pixels [B, H, W, c] in 0..255, of which both definitions are written.
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
    factor = 1.0 if gaussian else side**2 / (side**2 - 1)
    # Covariances do not see a shift, and float32 keeps their digits only about zero.
    shift_x, shift_y = (jnp.mean(i / RANGE, axis=(1, 2), keepdims=True) for i in (real, other))
    x, y = real / RANGE - shift_x, other / RANGE - shift_y
    mean_x, mean_y = _blur(x, window), _blur(y, window)
    var_x = factor * (_blur(x * x, window) - mean_x**2)
    var_y = factor * (_blur(y * y, window) - mean_y**2)
    cov = factor * (_blur(x * y, window) - mean_x * mean_y)
    mean_x, mean_y = mean_x + shift_x, mean_y + shift_y
    c1, c2 = 0.01**2, 0.03**2
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


def check(real: np.ndarray, other: np.ndarray) -> None:
    """ValueError if two sets of images cannot be compared one by one."""
    if real.shape != other.shape:
        raise ValueError(f"images {real.shape} cannot be compared with {other.shape}")
