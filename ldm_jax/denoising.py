"""Closures over `denoise(x, level) -> Denoised` that change the predicted x0 at every level.

`diffusion.clip_x0` is one more. They can be nested, and work with every solver.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.diffusion import Denoised, eps_from_x0


def dynamic_threshold(
    denoise: Callable, quantile: float = 0.995, limit: float = 1.0
) -> Callable[[jax.Array, Any], Denoised]:
    """`denoise` with x0 brought back into [-limit, limit], and the noise that goes with it.

    Saharia et al. 2022, section 2.3: s is the quantile of |x0| in an image, at least `limit`; x0 is
    clipped to [-s, s] and scaled by limit / s. It is meant for pixel models: latents have no
    bounds.
    """

    def thresholded(x, level):
        x0 = denoise(x, level).x0
        axes = tuple(range(1, x0.ndim))
        s = jnp.maximum(jnp.quantile(jnp.abs(x0), quantile, axis=axes, keepdims=True), limit)
        x0 = jnp.clip(x0, -s, s) * (limit / s)
        return Denoised(x0, eps_from_x0(x, x0, level.alpha, level.sigma))

    return thresholded


def quantize_x0(
    denoise: Callable, quantize: Callable[[jax.Array], jax.Array]
) -> Callable[[jax.Array, Any], Denoised]:
    """`denoise` with x0 replaced by `quantize(x0)`, and the noise as predicted.

    The reference's `quantize_denoised`, for the latents of a VQ first stage (in their own scale).
    """

    def quantized(x, level):
        x0, eps = denoise(x, level)
        return Denoised(quantize(x0), eps)

    return quantized
