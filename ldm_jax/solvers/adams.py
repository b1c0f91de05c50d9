"""Adams-Bashforth rules on the probability-flow ODE, d(x / alpha) / d(sigma / alpha) = eps.

With rho = sigma / alpha, a step integrates the polynomial through the last outputs exactly:

    x_next / alpha_next = x / alpha + sum_j eps_j integral of l_j from rho to rho_next

where l_j is Lagrange's polynomial, 1 at output j and 0 at the others. The l_j sum to 1, so this is
the step of order one plus sum_j w_j (eps_j - eps_0), w_j = alpha_next times the integral of l_j.
"""

from collections.abc import Callable

import numpy as np

from ldm_jax.solvers.loop import Solver
from ldm_jax.solvers.multistep import multistep, table


def lms(order: int = 4) -> Solver:
    """Linear multistep, k-diffusion's `sample_lms`: polynomials in rho. order: 1 to 4."""
    weigh = _integrated(lambda u: u)
    return multistep(order, "eps", lambda levels: table(levels, order, weigh, lower_below=0))


def deis(order: int = 3) -> Solver:
    """tAB-DEIS (Zhang and Chen 2022) with polynomials in log(rho). order: 1 to 4.

    `DEISMultistepScheduler` ("logrho") in diffusers, whose default order is 2.
    """
    weigh = _integrated(np.log)
    return multistep(order, "eps", lambda levels: table(levels, order, weigh))


def _integrated(coordinate: Callable) -> Callable:
    """weigh(level, behind) of `table`: the w_j, with Lagrange's polynomials in `coordinate`.

    u is rho in units of this level's: 1 here, exp(behind) earlier, exp(-h) next.
    """
    # Gauss-Legendre: 16 points integrate polynomials up to degree 31 exactly, those in a logarithm
    # to rounding over any step of a sampler.
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
