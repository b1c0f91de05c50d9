"""Order of convergence of the deterministic solvers, against the exact flow of Gaussian data."""

import gaussian
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import diffusion, solvers
from ldm_jax.solvers.adams import deis, lms

SCHEDULE = diffusion.make_schedule("linear", 4096, 0.1 / 4096, 20 / 4096)
KEYS = jax.random.split(jax.random.key(0), 2)
Z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 4)), jnp.float32)


def rms_error(solver, steps):
    # Even steps in log(alpha / sigma), down to timestep 0: no step grows as their number does.
    table = solvers.levels(SCHEDULE, steps, "exponential", "alphas_cumprod_0")
    x_T = gaussian.exact(Z, table.alpha[0], table.sigma[0])
    out = solvers.sample(solver, gaussian.denoise, table, x_T, KEYS)
    end = gaussian.exact(Z, table.alpha_next[-1], table.sigma_next[-1])
    return np.sqrt(np.mean((out - end) ** 2))


MAKE = solvers.SOLVERS


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (MAKE["euler"](), 1),
        (MAKE["plms"](), 2),  # its steps are not even in anything, so fixed weights give no more
        (MAKE["heun"](), 2),
        (MAKE["kdpm2"](), 2),
        (MAKE["dpmpp_2s"](), 2),
        (MAKE["dpmpp_2m"](), 2),
        (deis(2), 2),
        (MAKE["dpmpp_3m_sde"](eta=0.0), 2),  # see its docstring
        (MAKE["unipc"](), 3),  # order 2, and 1 more by the corrector
    ],
)
def test_order(solver, order):
    coarse, fine = rms_error(solver, 64), rms_error(solver, 128)
    assert abs(np.log2(coarse / fine) - order) < 0.1
    assert fine < 0.03 * 0.15 ** (order - 1)


@pytest.mark.parametrize(("solver", "order"), [(deis(3), 3), (lms(3), 3), (lms(4), 4)])
def test_order_of_extrapolation(solver, order):
    """Begun with lower orders, which hardly matter at the noisy end, so it is not quite met."""
    coarse, fine = rms_error(solver, 64), rms_error(solver, 128)
    assert np.log2(coarse / fine) > order - 0.4
    assert fine < 0.03 * 0.15 ** (order - 1)


@pytest.mark.parametrize(
    ("solver", "order", "coordinate"),
    [
        (lms(4), 4, lambda u: u),
        (lms(2), 2, lambda u: u),
        (deis(3), 3, np.log),
        (deis(2), 2, np.log),
    ],
)
def test_polynomials_are_integrated_exactly(solver, order, coordinate):
    """alpha_next times the integral over sigma / alpha; eps of degree order - 1."""
    table = solvers.levels(SCHEDULE, 24, "time_uniform")
    noise = table.sigma.astype(np.float64) / table.alpha
    for i in (4, 12, 20):
        following = table.sigma_next[i].astype(np.float64) / table.alpha_next[i]
        fine = np.linspace(noise[i], following, 20001)
        eps = lambda u: 1 + coordinate(u / noise[i]) ** (order - 1)  # noqa: B023, E731
        exact = table.alpha_next[i] * np.trapezoid(eps(fine), fine)
        past = eps(noise[i - order + 1 : i][::-1]) - eps(noise[i])
        row = solver.weights(table)[i, order - 1]
        first = table.alpha_next[i] * (following - noise[i]) * eps(noise[i])
        np.testing.assert_allclose(first + np.sum(row * past), exact, rtol=1e-4)
        assert abs(first / exact - 1) > 1e-3
