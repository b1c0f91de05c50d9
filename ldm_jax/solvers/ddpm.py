"""Ancestral sampling of DDPM (Ho et al. 2020, algorithm 2)."""

from typing import Literal

import jax
import jax.numpy as jnp

from ldm_jax.diffusion import rowwise_normal
from ldm_jax.solvers.loop import Solver

VARIANCES = ("fixed_small", "fixed_large")


def ddpm(
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small",
    temperature: jax.Array | float = 1.0,
) -> Solver:
    """A draw from q(x_next | x, x0), eq. 6-7: the paper's with trailing spacing and steps = T.

    With a = (alpha / alpha_next)^2 and beta = 1 - a of the step,

        mean = alpha_next beta / sigma^2 x0 + sqrt(a) sigma_next^2 / sigma^2 x
        variance = sigma_next^2 / sigma^2 beta

    On fewer levels beta is that of the whole step (Nichol and Dhariwal 2021, eq. 19). variance: the
    posterior's own ("fixed_small") or beta ("fixed_large"), section 3.2; a step to no noise at all
    adds none.
    temperature scales the fresh noise, as in the reference.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance {variance!r} is not one of {', '.join(VARIANCES)}")

    def step(denoise, carry, x, level, keys):
        denoised = denoise(x, level)
        of_x0 = level.alpha_next * level.beta / level.sigma**2
        of_x = level.alpha / level.alpha_next * (level.sigma_next / level.sigma) ** 2
        if variance == "fixed_small":
            std = level.sigma_next / level.sigma * jnp.sqrt(level.beta)
        else:
            std = jnp.where(level.sigma_next > 0, jnp.sqrt(level.beta), 0.0)
        noise = temperature * rowwise_normal(keys, x.shape[1:])
        return carry, of_x0 * denoised.x0 + of_x * x + std * noise, denoised

    return Solver(init=lambda x: (), step=step, noisy=True)
