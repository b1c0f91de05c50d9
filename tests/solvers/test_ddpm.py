"""DDPM: each step is a draw from the posterior; at full length and strided, with both variances."""

import gaussian
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import diffusion, solvers

SD = diffusion.make_schedule("scaled_linear")
KEYS = jax.random.split(jax.random.key(0), 3)
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 4)), jnp.float32)


def one_step(t, **options):
    """x_{t-1} from X by one step of the full-length sampler."""
    table = solvers.levels(SD, 1000, "trailing")
    level = jax.tree.map(lambda column: column[999 - t], table)
    assert level.t == t
    return solvers.SOLVERS["ddpm"](**options).step(gaussian.denoise, (), X, level, KEYS)


@pytest.mark.parametrize("t", [999, 500, 1])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_full_length_step_draws_from_the_posterior(t, variance):
    _, x, denoised = one_step(t, variance=variance)
    mean, small, _ = diffusion.posterior(SD, denoised.x0, X, jnp.full(3, t))
    std = np.sqrt(small if variance == "fixed_small" else SD.betas[t])
    noise = diffusion.rowwise_normal(KEYS, X.shape[1:])
    np.testing.assert_allclose(x, mean + std * noise, rtol=1e-5, atol=2e-6)
    _, cold, _ = one_step(t, variance=variance, temperature=0.0)
    np.testing.assert_allclose(cold, mean, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_last_step_adds_no_noise(variance):
    _, x, denoised = one_step(0, variance=variance)
    np.testing.assert_allclose(x, denoised.x0, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_strided_equals_ddim_with_eta_one(spacing):
    table = solvers.levels(SD, 20, spacing)
    one = solvers.sample(solvers.SOLVERS["ddpm"](), gaussian.denoise, table, X, KEYS)
    two = solvers.sample(solvers.SOLVERS["ddim"](eta=1.0), gaussian.denoise, table, X, KEYS)
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=2e-5)


def test_unknown_variance_is_refused():
    with pytest.raises(ValueError, match="'learned' is not one of fixed_small, fixed_large"):
        solvers.SOLVERS["ddpm"]("learned")
