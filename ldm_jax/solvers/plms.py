"""Pseudo linear multistep sampling (Liu et al. 2022), the reference's `PLMSSampler`."""

import jax
import numpy as np

from ldm_jax.solvers.heun import corrected
from ldm_jax.solvers.loop import Solver
from ldm_jax.solvers.multistep import empty, remember, span, table

# Eq. 12 and its lower orders, for n earlier outputs: eps' = eps_0 + sum_j b_j (eps_j - eps_0).
BASHFORTH = {
    1: np.array([-1]) / 2,
    2: np.array([-16, 5]) / 12,
    3: np.array([-59, 37, -9]) / 24,
}


def plms() -> Solver:
    """Adams-Bashforth as if the levels were evenly spaced; the first step, Heun's, calls twice."""

    def step(denoise, carry, x, level, keys):
        del keys
        first = carry[0] == 0
        denoised = denoise(x, level)
        x = level.alpha_next * denoised.x0 + level.sigma_next * denoised.eps
        carry, change = remember(carry, level.weights, denoised.eps)
        x = jax.lax.cond(
            first,
            lambda x: corrected(denoise, x, level, denoised),
            lambda x: x + change,
            x,
        )
        return carry, x, denoised

    def weights(levels):
        weigh = lambda level, behind: span(level) * BASHFORTH[len(behind)]  # noqa: E731
        return table(levels, 4, weigh, lower_below=0)

    return Solver(lambda x: empty(x, 4), step, weights)
