"""Every solver: the reference's trajectories, calls, start, pure noise, distribution, gradients."""

from pathlib import Path

import gaussian
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import diffusion, guidance, solvers

SD = diffusion.make_schedule("scaled_linear")
KEYS = jax.random.split(jax.random.key(0), 2)
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "samplers.npz")
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 2, 4)), jnp.float32)
STOCHASTIC = ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde")
WITH_HISTORY = ("plms", "dpmpp_2m", "dpmpp_3m_sde", "lms", "unipc", "deis")


def golden_model(prediction):
    """The closed-form model of golden/samplers.npz, predicting in any way."""

    def model(x, t_b, c):
        wave = 0.3 * jnp.sin(t_b.astype(jnp.float32) / 70)
        eps = 0.8 * jnp.tanh(x) + wave[:, None, None, None] + c[:, None, None, :]
        alpha, sigma = diffusion.signal_and_noise(SD, t_b, x.ndim)
        x0 = diffusion.x0_from_eps(x, eps, alpha, sigma)
        return diffusion.target(prediction, x0, eps, alpha, sigma)

    return model


@pytest.mark.parametrize(
    ("name", "steps", "prediction"),
    [
        *((name, n, "eps") for name in ("ddim", "plms", "dpmpp_2m") for n in (10, 20, 50)),
        ("ddim", 20, "v"),  # guidance is linear, so these agree although it acts on the raw output
        ("ddim", 20, "x0"),
    ],
)
def test_trajectory_equals_the_reference(name, steps, prediction):
    c, uc = jnp.asarray(GOLDEN["c"]), jnp.asarray(GOLDEN["uc"])
    x_T = jnp.asarray(GOLDEN["x_T"].transpose(0, 2, 3, 1))
    table = solvers.levels(SD, steps, "time_uniform" if name == "dpmpp_2m" else "leading")

    @jax.jit
    def sample(scale):
        model = guidance.classifier_free(golden_model(prediction), c, uc, scale)
        denoise = diffusion.denoiser(model, prediction)
        return solvers.sample(solvers.make(name), denoise, table, x_T, KEYS)

    for scale in (1.0, 3.0):
        key = f"{name.replace('_', '')}_{steps}_g{scale}"
        expected = GOLDEN[key].transpose(0, 2, 3, 1)
        assert np.max(np.abs(sample(scale) - expected)) <= 1e-5 * np.max(np.abs(expected))


def test_make_by_name():
    for name in solvers.SOLVERS:
        assert isinstance(solvers.make(name), solvers.Solver)
    with pytest.raises(ValueError, match="'rk45' is not one of ddim, ddpm, plms"):
        solvers.make("rk45")


def test_eta_for_a_solver_that_takes_none():
    for name in set(solvers.SOLVERS) - {"ddim"}:
        with pytest.raises(ValueError, match=f"eta=0.5: solver '{name}' takes none"):
            solvers.make(name, 0.5)

    @jax.jit
    def traced(eta):
        assert isinstance(solvers.make("ddpm", eta), solvers.Solver)
        return eta

    traced(0.5)


@pytest.mark.parametrize("name", solvers.SOLVERS)
@pytest.mark.parametrize("final", ["one", "alphas_cumprod_0"])
def test_calls_of_the_model(name, final):
    """And where they are: each x has the mean and spread of the level it is handed with."""
    table = solvers.levels(SD, 4, "trailing", final)
    called = []

    def denoise(x, level):
        called.append(float(level.t))
        return gaussian.denoise(x, level)

    with jax.disable_jit():
        x = solvers.sample(solvers.make(name), denoise, table, X, KEYS)
    assert np.all(np.isfinite(x))
    end = [] if final == "one" else [0]
    between = {
        "plms": [999, 749, *table.t[1:]],
        "heun": [999, 749, 749, 499, 499, 249, 249, *end],
        "kdpm2": [*np.stack([table.t, table.t_mid], 1).ravel()][: 7 + len(end)],
    }
    between["dpmpp_2s"] = between["kdpm2"]
    np.testing.assert_allclose(called, between.get(name, table.t), rtol=1e-6)


@pytest.mark.parametrize("name", WITH_HISTORY)
def test_history_begins_at_start(name):
    """A traced start gives the trajectory over the levels from there on, as if alone."""
    table = solvers.levels(SD, 22, "trailing")
    rest = jax.tree.map(lambda column: column[5:], table)
    solver = solvers.make(name)
    if name == "dpmpp_3m_sde":  # keys belong to a level's number
        solver = solvers.SOLVERS[name](eta=0.0)
    run = jax.jit(
        lambda start: solvers.sample(solver, gaussian.denoise, table, X, KEYS, start=start)
    )
    alone = solvers.sample(solver, gaussian.denoise, rest, X, KEYS)
    np.testing.assert_allclose(run(5), alone, rtol=1e-5, atol=2e-6)
    assert not np.allclose(run(0), alone, atol=0.05)
    np.testing.assert_array_equal(run(22), X)


@pytest.mark.parametrize(
    ("name", "eta", "prediction", "steps", "atol"),
    [
        *(("ddim", eta, "v", n, 2e-6) for n, eta in ((1, 0.0), (10, 0.0), (10, 1.0), (10, 1.5))),
        ("ddim", 0.0, "x0", 10, 2e-6),
        ("ddpm", 0.0, "v", 10, 2e-6),
        *((name, 0.0, "v", 6, 1e-5) for name in sorted(set(solvers.SOLVERS) - {"ddim", "ddpm"})),
    ],
)
def test_zero_terminal_snr_is_finite_and_exact(name, eta, prediction, steps, atol):
    """A model that knows the one image there is arrives at it from pure noise."""
    schedule = diffusion.zero_terminal_snr(SD)
    table = solvers.levels(schedule, steps, "trailing")
    assert table.alpha[0] == 0

    def model(x, t_b):
        alpha, sigma = diffusion.signal_and_noise(schedule, t_b, x.ndim)
        x0 = jnp.broadcast_to(X[:1], x.shape)
        eps = diffusion.eps_from_x0(x, x0, alpha, sigma)
        return diffusion.target(prediction, x0, eps, alpha, sigma)

    x_T = diffusion.rowwise_normal(KEYS, X.shape[1:])
    denoise = diffusion.denoiser(model, prediction)
    out = solvers.sample(solvers.make(name, eta), denoise, table, x_T, KEYS)
    np.testing.assert_allclose(out, jnp.broadcast_to(X[:1], out.shape), atol=atol)


@pytest.mark.parametrize(
    ("name", "options", "steps", "side", "atol"),
    [
        *(("ddim", {"eta": eta}, 400, 48, 0.04) for eta in (0.0, 0.5, 1.0)),
        *(("ddpm", {"variance": f"fixed_{v}"}, 400, 40, 0.05) for v in ("small", "large")),
        ("ddpm", {}, 1000, 40, 0.05),
        *((name, {}, 200, 40, 0.04) for name in STOCHASTIC[1:]),
    ],
)
def test_reaches_the_right_mean_and_variance(name, options, steps, side, atol):
    keys = jax.random.split(jax.random.key(1), 4)
    z = diffusion.rowwise_normal(keys, (side, side, 4))
    table = solvers.levels(diffusion.zero_terminal_snr(SD), steps, "trailing")
    x = solvers.sample(solvers.SOLVERS[name](**options), gaussian.denoise, table, z, keys)
    scale = gaussian.STD.ravel()
    mean = (np.mean(x, (0, 1, 2)) - gaussian.MEAN.ravel()) / scale
    np.testing.assert_allclose(mean, np.zeros(4), atol=atol)
    np.testing.assert_allclose(np.std(x, (0, 1, 2)) / scale, np.ones(4), atol=atol)
    if name in STOCHASTIC:  # fresh noise
        assert np.corrcoef(np.ravel(x[..., 0]), np.ravel(z[..., 0]))[0, 1] < 0.1


@pytest.mark.parametrize("spacing", ["quadratic", "linspace", "leading"])
@pytest.mark.parametrize("name", WITH_HISTORY)
def test_weights_are_finite_where_levels_repeat(name, spacing):
    steps, final = (250, None) if spacing == "quadratic" else (10, "alphas_cumprod_0")
    table = solvers.levels(SD, steps, spacing, final)
    assert np.any(table.h == 0) == (spacing != "leading")
    weights = solvers.make(name).weights(table)
    assert np.all(np.isfinite(weights))
    assert np.max(np.abs(weights)) < 10


@pytest.mark.parametrize("name", ["plms", "unipc", "heun"])
def test_gradient_equals_the_difference_quotient(name):
    table = solvers.levels(SD, 20, "trailing")

    @jax.jit
    @jax.value_and_grad
    def loss(x):
        denoise = jax.checkpoint(gaussian.denoise)
        return jnp.mean(solvers.sample(solvers.make(name), denoise, table, x, KEYS) ** 2)

    along = jnp.asarray(np.random.default_rng(1).normal(size=X.shape), jnp.float32)
    slope = (loss(X + 0.05 * along)[0] - loss(X - 0.05 * along)[0]) / 0.1
    np.testing.assert_allclose(jnp.sum(loss(X)[1] * along), slope, rtol=5e-3)
