"""Adams-Bashforth rules on the probability-flow ODE, d(x / alpha) / d(sigma / alpha) = eps.

eps is extrapolated through earlier outputs by a polynomial, whose integral over the step is exact.
"""

from collections.abc import Callable

import numpy as np

from ldm_jax.solvers.loop import Solver
from ldm_jax.solvers.multistep import multistep, table


def lms(order: int = 4) -> Solver:
    """k-diffusion `sample_lms`: polynomials in sigma / alpha. order: 1 to 4."""
    weigh = _integrated(lambda u: u)
    return multistep(order, "eps", lambda levels: table(levels, order, weigh, lower_below=0))


def deis(order: int = 3) -> Solver:
    """tAB-DEIS (Zhang and Chen 2022) with polynomials in log(sigma / alpha). order: 1 to 4.

    "logrho" in diffusers, whose default order is 2.
    """
    weigh = _integrated(np.log)
    return multistep(order, "eps", lambda levels: table(levels, order, weigh))


def _integrated(coordinate: Callable) -> Callable:
    """weigh(level, behind) of `table`: Lagrange's polynomials in `coordinate` over the step.

    u is sigma / alpha in units of this level's: 1 here, exp(behind) earlier, exp(-h) next.
    """
    points, shares = np.polynomial.legendre.leggauss(16)

    def weigh(level, behind):
        nodes = coordinate(np.exp(np.append(0.0, behind)))
        noise = np.float64(level.sigma) / max(np.float64(level.alpha), 1e-15)
        length = np.expm1(-np.float64(level.h))
        at = coordinate(1 + length * (points + 1) / 2)
        integrals = []
        for j in range(1, len(nodes)):
            others = np.delete(nodes, j)[:, None]
            integrals.append(np.sum(shares * np.prod((at - others) / (nodes[j] - others), axis=0)))
        return level.alpha_next * noise * length / 2 * np.array(integrals)

    return weigh
