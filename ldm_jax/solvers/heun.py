"""Heun's rule on the probability-flow ODE (Karras et al. 2022, algorithm 1, without churn)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.diffusion import Denoised
from ldm_jax.solvers.loop import Solver


def heun() -> Solver:
    """Heun's solver: two calls of the model per level; one in a step from pure noise or to none."""

    def step(denoise, carry, x, level, keys):
        del keys
        denoised = denoise(x, level)
        x = level.alpha_next * denoised.x0 + level.sigma_next * denoised.eps
        return carry, corrected(denoise, x, level, denoised), denoised

    return Solver(init=lambda x: (), step=step)


def corrected(denoise: Callable, x: jax.Array, level: Any, denoised: Denoised) -> jax.Array:
    """Correct Euler's x at the next level to the mean slope of both ends (algorithm 1, line 8).

    With rho = sigma / alpha,

        x_next / alpha_next = x / alpha + (rho_next - rho) (eps + eps_next) / 2
    """

    def correct(x):
        there = level._replace(t=level.t_next, alpha=level.alpha_next, sigma=level.sigma_next)
        span = -level.sigma_next * jnp.expm1(level.h)  # see `multistep.span`
        return x + 0.5 * span * (denoise(x, there).eps - denoised.eps)

    return jax.lax.cond(has_second_stage(level), correct, lambda x: x, x)


def has_second_stage(level: Any) -> jax.Array:
    """True where the slope is finite at both ends of the step."""
    return (level.alpha > 0) & (level.sigma_next > 0)
