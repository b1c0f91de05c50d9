"""First-stage objective: reconstruction under a learned variance, plus KL (`contperceptual.py`)."""

import jax
import jax.numpy as jnp

from ldm_jax import schema


def gaussian_kl(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of [B, h, w, z], summed over h, w, z: [B]."""
    return 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3))


def first_stage(
    config: schema.FirstStageLossConfig,
    image: jax.Array,
    reconstruction: jax.Array,
    mean: jax.Array,
    logvar: jax.Array,
    error_logvar: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of every row [B] and scalar metrics; images [B, H, W, c] in [-1, 1].

    Error and KL are *summed* over an image, as the reference does for KL: kl_weight 1e-6 stands
    beside about 2e5 pixel values. `error_logvar` is the scalar log-variance of the error.
    """
    difference = image - reconstruction
    error = jnp.abs(difference) if config.pixel == "l1" else jnp.square(difference)
    nll = jnp.sum(error / jnp.exp(error_logvar) + error_logvar, axis=(1, 2, 3))
    kl = gaussian_kl(mean, logvar)
    mse = jnp.mean(jnp.square(difference), axis=(1, 2, 3))
    loss = nll + config.kl_weight * kl
    metrics = {
        "loss": jnp.mean(loss),
        "error": jnp.mean(error),
        "kl": jnp.mean(kl),
        "psnr": jnp.mean(psnr(mse)),
    }
    return loss, metrics


def psnr(mse: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB from the mean squared error of images in [-1, 1]."""
    return 10.0 * jnp.log10(4.0 / jnp.maximum(mse, 1e-12))
