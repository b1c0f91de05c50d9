"""Pseudo linear multistep sampling (Liu et al. 2022), the reference's `PLMSSampler`."""

import jax
import numpy as np

from ldm_jax.solvers.heun import corrected
from ldm_jax.solvers.loop import Solver
from ldm_jax.solvers.multistep import empty, remember, span, table

# Liu et al. 2022, eq. 12, and Adams-Bashforth of lower order as long as fewer outputs are known:
#   eps' = (3 eps_0 - eps_1) / 2
#   eps' = (23 eps_0 - 16 eps_1 + 5 eps_2) / 12
#   eps' = (55 eps_0 - 59 eps_1 + 37 eps_2 - 9 eps_3) / 24
# as eps' = eps_0 + sum_j b_j (eps_j - eps_0), since the coefficients sum to 1; {n: b_1 ... b_n}.
BASHFORTH = {
    1: np.array([-1]) / 2,
    2: np.array([-16, 5]) / 12,
    3: np.array([-59, 37, -9]) / 24,
}


def plms() -> Solver:
    """PLMS: Adams-Bashforth with the weights of evenly spaced levels, whatever the spacing.

    The first step is Heun's, with two calls of the model.
    """

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
