"""Image <-> scaled latent; the only place where the latent scale is applied.

Diffusion runs on `scale * z`; first stages take and give unscaled z. `scale` is 1 / std of the
latents of training images (`ddpm.py`, `scale_by_std`; section 4.3.2 of the paper and D.1).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import diffusion


def encode(
    first_stage: Any, params: dict, image: jax.Array, scale: Any, keys: jax.Array | None = None
) -> jax.Array:
    """image [B, H, W, c] in [-1, 1] -> scaled latent [B, h, w, z].

    With `keys` [B] a sample of the posterior (training), without them its mode (conditioning).
    A vector-quantized stage, or none, has no posterior: its latent, before quantization, is both.
    """
    return draw(first_stage.apply({"params": params}, image, method="encode"), scale, keys)


def draw(encoded: Any, scale: Any, keys: jax.Array | None = None) -> jax.Array:
    """Scaled latent from the output of a first stage's `encode`; `keys` as in `encode`."""
    if not isinstance(encoded, tuple):
        return scale * encoded.astype(jnp.float32)
    mean, logvar = (a.astype(jnp.float32) for a in encoded)
    if keys is None:
        return scale * mean
    return scale * (mean + jnp.exp(0.5 * logvar) * diffusion.rowwise_normal(keys, mean.shape[1:]))


def decode(first_stage: Any, params: dict, latent: jax.Array, scale: Any) -> jax.Array:
    """Scaled latent [B, h, w, z] -> image [B, H, W, c], not clipped."""
    image = first_stage.apply({"params": params}, latent / scale, method="decode")
    return image.astype(jnp.float32)


ROUNDING = 1e-6
"""Largest share of the mean square that a variance of zero may seem to have, because the moments
are rounded to float32."""


def std_from_moments(means: Sequence[float], mean_squares: Sequence[float]) -> float:
    """Standard deviation over equally large batches, in float64, from each one's two moments.

    The reference uses the first batch of one device; this uses all given batches. ValueError for
    moments that are not finite, and for latents that are equal up to rounding.
    """
    square = float(np.mean(mean_squares, dtype=np.float64))
    variance = square - float(np.mean(means, dtype=np.float64)) ** 2
    if not np.isfinite(variance) or variance <= ROUNDING * square:
        raise ValueError(
            f"the latents' variance is {variance:.3g} beside a mean square of {square:.3g}: train"
            " the first stage longer, unless the training images are all alike; or give"
            " --first-stage.scale"
        )
    return variance**0.5
