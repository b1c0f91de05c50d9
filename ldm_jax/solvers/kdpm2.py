"""The midpoint rule: two calls of the model per level, the second halfway in log(alpha / sigma)."""

from typing import Literal

import jax
import jax.numpy as jnp

from ldm_jax.solvers.heun import has_second_stage
from ldm_jax.solvers.loop import Solver


def kdpm2() -> Solver:
    """DPM-Solver-2 (Lu et al. 2022a, algorithm 1), k-diffusion's `sample_dpm_2` without churn.

        x_next = alpha_next / alpha x - sigma_next (exp(h) - 1) eps_half

    where eps_half is eps at the level halfway in log(alpha / sigma).
    """
    return midpoint("eps")


def midpoint(of: Literal["x0", "eps"]) -> Solver:
    """The step of order one with x0 or eps of the level halfway.

    A step from pure noise or to none has no second stage.
    """

    def step(denoise, carry, x, level, keys):
        del keys
        denoised = denoise(x, level)
        x_half = level.alpha_mid * denoised.x0 + level.sigma_mid * denoised.eps

        def correct(x):
            half = level._replace(t=level.t_mid, alpha=level.alpha_mid, sigma=level.sigma_mid)
            change = getattr(denoise(x_half, half), of) - getattr(denoised, of)
            if of == "eps":
                return x - level.sigma_next * jnp.expm1(level.h) * change
            return x - level.alpha_next * jnp.expm1(-level.h) * change

        x = level.alpha_next * denoised.x0 + level.sigma_next * denoised.eps
        return carry, jax.lax.cond(has_second_stage(level), correct, lambda x: x, x), denoised

    return Solver(init=lambda x: (), step=step)
