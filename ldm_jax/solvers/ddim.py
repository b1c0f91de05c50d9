"""DDIM (Song et al. 2021)."""

import jax
import jax.numpy as jnp

from ldm_jax.diffusion import append_dims, rowwise_normal
from ldm_jax.solvers.loop import Solver


def ddim(eta: jax.Array | float = 0.0, temperature: jax.Array | float = 1.0) -> Solver:
    """DDIM's eq. 12; eta = 0 is deterministic, 1 is ancestral DDPM sampling on the same levels.

        x_next = alpha_next x0 + sqrt(sigma_next^2 - fresh^2) eps + fresh noise
        fresh = eta (sigma_next / sigma) sqrt(1 - (alpha / alpha_next)^2)    (eq. 16)

    temperature scales the fresh noise, as in the reference. Both are scalars or [B], and may be
    traced.
    """

    def step(denoise, carry, x, level, keys):
        denoised = denoise(x, level)
        fresh = level.sigma_next / level.sigma * _sqrt(level.beta)
        fresh = append_dims(eta, x.ndim) * fresh
        kept = _sqrt(level.sigma_next**2 - fresh**2)
        noise = append_dims(temperature, x.ndim) * rowwise_normal(keys, x.shape[1:])
        x = level.alpha_next * denoised.x0 + kept * denoised.eps + fresh * noise
        return carry, x, denoised

    return Solver(init=lambda x: (), step=step)


def _sqrt(x: jax.Array) -> jax.Array:
    """sqrt, and 0 below 0 (rounding, eta > 1, inverted levels).

    The inner `where` keeps the derivative finite: that of sqrt at 0, times 0, would be NaN.
    """
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)
