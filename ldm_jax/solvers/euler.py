"""Euler's rule on the probability-flow ODE, plain and ancestral (k-diffusion).

d(x / alpha) / d(sigma / alpha) = eps: along a step x / alpha moves on a line, which passes through
alpha' x0 + sigma' eps at every other level. That is DDIM, and holds at alpha = 0 too.
"""

import jax

from ldm_jax.solvers.ddim import ddim
from ldm_jax.solvers.loop import Solver


def euler() -> Solver:
    """k-diffusion `sample_euler` without churn; DDIM with eta = 0."""

    def step(denoise, carry, x, level, keys):
        del keys
        denoised = denoise(x, level)
        return carry, level.alpha_next * denoised.x0 + level.sigma_next * denoised.eps, denoised

    return Solver(init=lambda x: (), step=step)


def euler_ancestral(eta: jax.Array | float = 1.0) -> Solver:
    """k-diffusion `sample_euler_ancestral`: Euler to less noise, then fresh noise up to the level.

    With rho = sigma / alpha, `get_ancestral_step` has sigma_up = eta rho_next sqrt(1 - (rho_next /
    rho)^2), which is DDIM's fresh noise for the same eta, in units of alpha_next.
    """
    return ddim(eta)._replace(noisy=True)
