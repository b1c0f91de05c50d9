"""Euler's rule on the probability-flow ODE, plain and ancestral (k-diffusion)."""

import jax
import jax.numpy as jnp

from ldm_jax.diffusion import rowwise_normal
from ldm_jax.solvers.loop import Solver


def euler() -> Solver:
    """k-diffusion `sample_euler` without churn: d(x / alpha) / d(sigma / alpha) = eps.

    In variance-preserving coordinates this is DDIM with eta = 0, and holds at alpha = 0 too.
    """

    def step(denoise, carry, x, level, keys):
        del keys
        denoised = denoise(x, level)
        return carry, level.alpha_next * denoised.x0 + level.sigma_next * denoised.eps, denoised

    return Solver(init=lambda x: (), step=step)


def euler_ancestral(eta: jax.Array | float = 1.0) -> Solver:
    """k-diffusion `sample_euler_ancestral`: Euler to less noise, then fresh noise up to the level.

    eta: 1 draws from DDPM's posterior, 0 is `euler`. May be traced.
    """

    def step(denoise, carry, x, level, keys):
        denoised = denoise(x, level)
        # `get_ancestral_step` in units of sigma_next: sigma_up and sigma_down.
        fresh = jnp.minimum(1.0, eta * jnp.sqrt(-jnp.expm1(-2 * level.h)))
        kept = jnp.sqrt(1 - fresh**2)
        noise = kept * denoised.eps + fresh * rowwise_normal(keys, x.shape[1:])
        return carry, level.alpha_next * denoised.x0 + level.sigma_next * noise, denoised

    return Solver(init=lambda x: (), step=step)
