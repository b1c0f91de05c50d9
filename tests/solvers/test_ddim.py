"""DDIM: order of convergence, temperature, zero terminal SNR, eta by row."""

import gaussian
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import diffusion, solvers

SD = diffusion.make_schedule("scaled_linear")
KEYS = jax.random.split(jax.random.key(0), 2)


def rms_error(steps):
    # Betas small enough that the schedule is smooth on the scale of a step.
    schedule = diffusion.make_schedule("linear", 4096, 0.1 / 4096, 20 / 4096)
    table = solvers.levels(schedule, steps, "trailing")
    z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 4)), jnp.float32)
    x_T = gaussian.exact(z, table.alpha[0], table.sigma[0])
    out = solvers.sample(solvers.SOLVERS["ddim"](), gaussian.denoise, table, x_T, KEYS)
    return np.sqrt(np.mean((out - gaussian.exact(z, 1.0, 0.0)) ** 2))


def test_converges_to_the_exact_flow_with_order_one():
    coarse, middle, fine = rms_error(128), rms_error(256), rms_error(512)
    assert fine < 0.01
    assert abs(np.log2(coarse / middle) - 1) < 0.1
    assert abs(np.log2(middle / fine) - 1) < 0.05


def test_temperature_scales_the_fresh_noise_alone():
    table = solvers.levels(SD, 5)
    level = jax.tree.map(lambda column: column[2], table)
    x = jnp.ones((2, 1, 1, 4))
    noise = diffusion.rowwise_normal(KEYS, (1, 1, 4))
    steps = (solvers.ddim(1.0, k).step(gaussian.denoise, (), x, level, KEYS) for k in (0, 0.5, 1))
    cold, half, full = (x for _, x, _ in steps)
    sigma = level.sigma_next / level.sigma * np.sqrt(level.beta)
    np.testing.assert_allclose(full - cold, sigma * noise, atol=1e-6)
    np.testing.assert_allclose(half - cold, 0.5 * sigma * noise, atol=1e-6)


def test_zero_terminal_snr_follows_the_exact_flow():
    schedule = diffusion.zero_terminal_snr(SD)
    table = solvers.levels(schedule, 500, "trailing")
    z = diffusion.rowwise_normal(KEYS, (8, 8, 4))
    denoise = diffusion.denoiser(gaussian.v_model(schedule), "v")
    out = solvers.sample(solvers.SOLVERS["ddim"](), denoise, table, z, KEYS)
    np.testing.assert_allclose(out, gaussian.exact(z, 1.0, 0.0), atol=0.05)


def test_every_row_may_have_its_own_eta():
    """As many rows as channels: nothing else than the axes tells which is meant."""
    denoise = lambda x, level: diffusion.Denoised(0.5 * x, jnp.tanh(x))  # noqa: E731
    levels, x_T = solvers.levels(SD, 4, "leading"), jnp.ones((2, 1, 1, 2))
    etas = jnp.array([0.0, 0.7])

    def run(eta, temperature=1.0):
        return solvers.sample(solvers.ddim(eta, temperature), denoise, levels, x_T, KEYS)

    each = jnp.stack([run(eta)[i] for i, eta in enumerate(etas)])
    np.testing.assert_allclose(run(etas), each, rtol=1e-6)
    np.testing.assert_allclose(run(0.7, jnp.array([0.0, 1.0]))[1], each[1], rtol=1e-6)
