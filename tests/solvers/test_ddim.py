"""DDIM: the reference's trajectories, order of convergence, distribution, zero terminal SNR."""

from pathlib import Path

import gaussian
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import diffusion, guidance, solvers

pytestmark = pytest.mark.usefixtures("quick_compilation")

SD = diffusion.make_schedule("scaled_linear")
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "samplers.npz")
KEYS = jax.random.split(jax.random.key(0), 2)


def golden_eps(x, t_b, c):
    """The closed-form model of golden/samplers.npz."""
    wave = 0.3 * jnp.sin(t_b.astype(jnp.float32) / 70)
    return 0.8 * jnp.tanh(x) + wave[:, None, None, None] + c[:, None, None, :]


def predicting(prediction):
    """`golden_eps` as a model of any prediction type."""

    def model(x, t_b, c):
        alpha, sigma = diffusion.signal_and_noise(SD, t_b, x.ndim)
        eps = golden_eps(x, t_b, c)
        x0 = diffusion.x0_from_eps(x, eps, alpha, sigma)
        return diffusion.target(prediction, x0, eps, alpha, sigma)

    return model


@pytest.mark.parametrize(
    ("steps", "scale", "prediction"),
    [
        *((steps, scale, "eps") for steps in (10, 20, 50) for scale in (1.0, 3.0)),
        (20, 3.0, "v"),  # guidance is linear, so these agree although it acts on the raw prediction
        (20, 3.0, "x0"),
    ],
)
def test_trajectory_equals_the_reference(steps, scale, prediction):
    model = guidance.classifier_free(
        predicting(prediction), jnp.asarray(GOLDEN["c"]), jnp.asarray(GOLDEN["uc"]), scale
    )
    x_T = jnp.asarray(GOLDEN["x_T"].transpose(0, 2, 3, 1))
    solver = solvers.SOLVERS["ddim"]()
    denoise = diffusion.denoiser(model, prediction)
    out = solvers.sample(solver, denoise, solvers.levels(SD, steps), x_T, KEYS)
    expected = GOLDEN[f"ddim_{steps}_g{scale}"].transpose(0, 2, 3, 1)
    assert np.max(np.abs(out - expected)) <= 1e-5 * np.max(np.abs(expected))


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


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_reaches_the_right_mean_and_variance(eta):
    keys = jax.random.split(jax.random.key(1), 4)
    z = diffusion.rowwise_normal(keys, (48, 48, 4))
    table = solvers.levels(diffusion.zero_terminal_snr(SD), 400, "trailing")
    x = solvers.sample(solvers.SOLVERS["ddim"](eta=eta), gaussian.denoise, table, z, keys)
    scale = gaussian.STD.ravel()
    np.testing.assert_allclose(
        (np.mean(x, (0, 1, 2)) - gaussian.MEAN.ravel()) / scale, np.zeros(4), atol=0.04
    )
    np.testing.assert_allclose(np.std(x, (0, 1, 2)) / scale, np.ones(4), atol=0.04)


def test_temperature_scales_the_fresh_noise_alone():
    table = solvers.levels(SD, 5)
    level = jax.tree.map(lambda column: column[2], table)
    x = jnp.ones((2, 1, 1, 4))
    noise = diffusion.rowwise_normal(KEYS, (1, 1, 4))
    cold, half, full = (
        solvers.SOLVERS["ddim"](eta=1.0, temperature=k).step(gaussian.denoise, (), x, level, KEYS)[
            1
        ]
        for k in (0.0, 0.5, 1.0)
    )
    sigma = level.sigma_next / level.sigma * np.sqrt(level.beta)
    np.testing.assert_allclose(full - cold, sigma * noise, atol=1e-6)
    np.testing.assert_allclose(half - cold, 0.5 * sigma * noise, atol=1e-6)


@pytest.mark.parametrize(
    ("prediction", "steps", "eta"),
    [("v", 1, 0.0), ("v", 10, 0.0), ("v", 10, 1.0), ("v", 10, 1.5), ("x0", 10, 0.0)],
)
def test_zero_terminal_snr_is_finite_and_exact(prediction, steps, eta):
    """A model that knows the one image there is arrives at it from pure noise."""
    schedule = diffusion.zero_terminal_snr(SD)
    image = jnp.asarray(np.random.default_rng(1).normal(size=(1, 2, 2, 4)), jnp.float32)

    def model(x, t_b):
        alpha, sigma = diffusion.signal_and_noise(schedule, t_b, x.ndim)
        x0 = jnp.broadcast_to(image, x.shape)
        eps = diffusion.eps_from_x0(x, x0, alpha, sigma)
        return diffusion.target(prediction, x0, eps, alpha, sigma)

    table = solvers.levels(schedule, steps, "trailing")
    assert table.alpha[0] == 0
    x_T = diffusion.rowwise_normal(KEYS, (2, 2, 4))
    denoise = diffusion.denoiser(model, prediction)
    out = solvers.sample(solvers.SOLVERS["ddim"](eta=eta), denoise, table, x_T, KEYS)
    np.testing.assert_allclose(out, jnp.broadcast_to(image, out.shape), atol=2e-6)


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
