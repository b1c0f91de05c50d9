"""DPM-Solver++ (Lu et al. 2022b): polynomials of x0 in log(alpha / sigma), the noise integrated.

h, r: steps in log(alpha / sigma), and earlier ones in units of this one.
"""

import numpy as np

from ldm_jax.solvers.kdpm2 import midpoint
from ldm_jax.solvers.loop import Solver
from ldm_jax.solvers.multistep import multistep, table


def dpmpp_2s() -> Solver:
    """DPM-Solver++(2S), algorithm 1 with r = 1/2: two calls of the model per level."""
    return midpoint("x0")


def dpmpp_2m() -> Solver:
    """DPM-Solver++(2M), algorithm 2."""
    return dpmpp_2m_sde(eta=0.0)


def dpmpp_2m_sde(eta: float = 1.0) -> Solver:
    """SDE-DPM-Solver++(2M), k-diffusion's `sample_dpmpp_2m_sde` ("midpoint")."""

    def weigh(level, behind):
        h = np.float64(level.h)
        return 0.5 * level.alpha_next * np.expm1(-(1 + eta) * h) * h / behind

    return multistep(2, "x0", lambda levels: table(levels, 2, weigh), eta)


def dpmpp_3m_sde(eta: float = 1.0) -> Solver:
    """k-diffusion's `sample_dpmpp_3m_sde`.

    Its term of second differences has half the factor that quadratic extrapolation gives (so does
    the authors' multistep solver of order three); it is kept, so that images are the same.
    """

    def weigh(level, behind):
        h = np.float64(level.h)
        phi_2 = np.expm1(-(1 + eta) * h) / ((1 + eta) * h) + 1
        if len(behind) == 1:
            return -level.alpha_next * phi_2 * h / behind
        phi_3 = phi_2 / ((1 + eta) * h) - 0.5
        r0, r1 = np.diff(behind, prepend=0) / h
        # phi_2 d1 - phi_3 d2 = phi_2 d1_0 + second (d1_0 - d1_1), with the first differences
        # d1_0 = (m_0 - m_1) / r0 and d1_1 = (m_1 - m_2) / r1.
        second = (phi_2 * r0 - phi_3) / (r0 + r1)
        of_m1 = -(phi_2 + second) / r0 - second / r1
        return level.alpha_next * np.array([of_m1, second / r1])

    return multistep(3, "x0", lambda levels: table(levels, 3, weigh), eta)
