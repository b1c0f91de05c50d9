"""DPM-Solver++ (Lu et al. 2022b): x0 as a polynomial in lambda = log(alpha / sigma).

h is the step in lambda, h_1 and h_2 are those before; r = h_1 / h; m_0 is x0 here, m_1 and m_2 are
earlier ones.
"""

import numpy as np

from ldm_jax.solvers.kdpm2 import midpoint
from ldm_jax.solvers.loop import Solver
from ldm_jax.solvers.multistep import multistep, table


def dpmpp_2s() -> Solver:
    """DPM-Solver++(2S), algorithm 1 with r = 1/2: two calls of the model per level.

        x_next = sigma_next / sigma x - alpha_next (exp(-h) - 1) m_half

    where m_half is x0 at the level halfway in lambda.
    """
    return midpoint("x0")


def dpmpp_2m() -> Solver:
    """DPM-Solver++(2M), algorithm 2.

        x_next = sigma_next / sigma x - alpha_next (exp(-h) - 1) D
        D = (1 + 1 / (2 r)) m_0 - 1 / (2 r) m_1

    where D extrapolates x0 to the middle of the step.
    """
    return dpmpp_2m_sde(eta=0.0)


def dpmpp_2m_sde(eta: float = 1.0) -> Solver:
    """SDE-DPM-Solver++(2M), k-diffusion's `sample_dpmpp_2m_sde` ("midpoint").

        x_next = sigma_next / sigma exp(-eta h) x + alpha_next (1 - exp(-(1 + eta) h)) D
                 + sigma_next sqrt(1 - exp(-2 eta h)) noise

    with D of `dpmpp_2m`.
    """

    def weigh(level, behind):
        h = np.float64(level.h)
        return 0.5 * level.alpha_next * np.expm1(-(1 + eta) * h) * h / behind

    return multistep(2, "x0", lambda levels: table(levels, 2, weigh), eta)


def dpmpp_3m_sde(eta: float = 1.0) -> Solver:
    """k-diffusion's `sample_dpmpp_3m_sde`.

    Its change to the step of order one, with e = (1 + eta) h, r0 = h_1 / h, r1 = h_2 / h, is

        alpha_next (phi_2 d1 - phi_3 d2)
        d1_0 = (m_0 - m_1) / r0, d1_1 = (m_1 - m_2) / r1
        d1 = d1_0 + (d1_0 - d1_1) r0 / (r0 + r1), d2 = (d1_0 - d1_1) / (r0 + r1)
        phi_2 = (exp(-e) - 1) / e + 1, phi_3 = phi_2 / e - 1/2

    The term of second differences has half the factor that quadratic extrapolation gives (so does
    the authors' multistep solver of order three); it is kept, so that images are the same.
    """

    def weigh(level, behind):
        h = np.float64(level.h)
        phi_2 = np.expm1(-(1 + eta) * h) / ((1 + eta) * h) + 1
        if len(behind) == 1:
            return -level.alpha_next * phi_2 * h / behind
        phi_3 = phi_2 / ((1 + eta) * h) - 0.5
        r0, r1 = np.diff(behind, prepend=0) / h
        # phi_2 d1 - phi_3 d2 = phi_2 d1_0 + second (d1_0 - d1_1), sorted by m_1 - m_0 and m_2 - m_0
        second = (phi_2 * r0 - phi_3) / (r0 + r1)
        of_m1 = -(phi_2 + second) / r0 - second / r1
        return level.alpha_next * np.array([of_m1, second / r1])

    return multistep(3, "x0", lambda levels: table(levels, 3, weigh), eta)
