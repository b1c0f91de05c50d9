"""Schedules against the reference's numbers; every formula against a second derivation of it."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import diffusion, schema
from ldm_jax.diffusion import Denoised, make_schedule

GOLDEN = Path(__file__).parent / "golden"
SD = make_schedule("scaled_linear")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- schedules ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("linear_0.0015_0.0195", ("scaled_linear", 1000, 0.0015, 0.0195)),
        ("linear_0.00085_0.012", ("scaled_linear",)),
        ("cosine_0.0001_0.02", ("cosine",)),
        ("sqrt_linear_0.0001_0.02", ("linear", 1000, 1e-4, 0.02)),
    ],
)
def test_schedule_equals_the_reference(name, args):
    schedule = make_schedule(*args)
    golden = np.load(GOLDEN / "schedules.npz")[name]
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == np.float64
    np.testing.assert_allclose(schedule.alphas_cumprod, golden, rtol=1e-13)
    np.testing.assert_allclose(np.cumprod(1 - schedule.betas), golden, rtol=1e-13)


@pytest.mark.parametrize(
    ("start", "end", "first", "last", "last_alpha"),
    [
        (0.0015, 0.0195, 0.998500, 1.42304e-4, 0.01193),
        (0.0015, 0.0155, 0.998500, 6.68665e-4, 0.02586),
        (0.0015, 0.0205, 0.998500, 9.69109e-5, 0.00984),
        (0.0015, 0.015, 0.998500, 8.12518e-4, 0.02850),
        (0.00085, 0.012, 0.999150, 4.66010e-3, 0.06826),
        (1e-4, 0.02, 0.999900, 7.33412e-4, 0.02708),
    ],
)
def test_published_schedules_end_where_they_should(start, end, first, last, last_alpha):
    ac = make_schedule("scaled_linear", 1000, start, end).alphas_cumprod
    np.testing.assert_allclose([ac[0], ac[-1]], [first, last], rtol=5e-6)
    assert abs(np.sqrt(ac[-1]) - last_alpha) < 1e-5


def test_sqrt_schedule_is_the_root_of_the_linear_one():
    linear = make_schedule("linear", 10, 0.01, 0.25)
    np.testing.assert_allclose(make_schedule("sqrt", 10, 0.01, 0.25).betas, np.sqrt(linear.betas))
    np.testing.assert_allclose(linear.betas[[0, 3, -1]], [0.01, 0.09, 0.25])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("cosine", 1000, 1e-4, 0.02), "cosine .* beta_start=0.0001.* None"),
        (("cosine", 1000, None, 0.02), "beta_end=0.02"),
        (("sigmoid",), "'sigmoid' is not one of"),
        (("linear", 1), "timesteps=1"),
        (("linear", 1000, 0.02, 1e-4), "beta_start=0.02"),
        (("linear", 1000, 0.1, 1.0), "beta_end=1.0"),
    ],
)
def test_bad_schedule_is_refused(args, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(*args)


def test_zero_terminal_snr_follows_the_paper():
    shifted = diffusion.zero_terminal_snr(SD)
    alpha, out = np.sqrt(SD.alphas_cumprod), np.sqrt(shifted.alphas_cumprod)
    assert out[-1] == 0
    assert shifted.betas[-1] == 1
    np.testing.assert_allclose(out[0], alpha[0], rtol=1e-14)
    # Linear in alpha: differences keep their proportions.
    stretch = alpha[0] / (alpha[0] - alpha[-1])
    np.testing.assert_allclose(np.diff(out), np.diff(alpha) * stretch, rtol=1e-9)
    np.testing.assert_allclose(np.cumprod(1 - shifted.betas), shifted.alphas_cumprod, rtol=1e-10)


def test_from_config():
    config = schema.DiffusionConfig(schedule="linear", timesteps=20, beta_start=0.01, beta_end=0.2)
    expected = make_schedule("linear", 20, 0.01, 0.2)
    np.testing.assert_array_equal(diffusion.from_config(config).betas, expected.betas)
    config = schema.DiffusionConfig("cosine", beta_start=None, beta_end=None)
    assert len(diffusion.from_config(config).betas) == 1000
    config = schema.DiffusionConfig(zero_terminal_snr=True, prediction="v")
    assert diffusion.from_config(config).alphas_cumprod[-1] == 0
    with pytest.raises(ValueError, match=r"prediction='eps'.*'v' or 'x0'"):
        diffusion.from_config(schema.DiffusionConfig(zero_terminal_snr=True))


# --- forward process and posterior --------------------------------------------------------------


def test_q_sample_scales_each_row_by_its_own_level():
    x0, noise, t = normal(0, 3, 2, 2, 1), normal(1, 3, 2, 2, 1), np.array([0, 500, 999])
    out = diffusion.q_sample(SD, x0, jnp.asarray(t), noise)
    for row, ac in enumerate(SD.alphas_cumprod[t]):
        expected = np.sqrt(ac) * x0[row] + np.sqrt(1 - ac) * noise[row]
        np.testing.assert_allclose(out[row], expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", [SD, diffusion.zero_terminal_snr(SD)], ids=["sd", "ztsnr"])
def test_fractional_time_passes_through_the_whole_ones(schedule):
    whole = jnp.array([0, 1, 500, 998, 999])
    for ours, table in zip(
        diffusion.signal_and_noise(schedule, whole.astype(jnp.float32), 1),
        diffusion.signal_and_noise(schedule, whole, 1),
        strict=True,
    ):
        np.testing.assert_allclose(ours, table, rtol=2e-5, atol=1e-12)
    alpha, sigma = diffusion.signal_and_noise(schedule, jnp.array([500.5]), 1)
    between = np.sqrt(schedule.alphas_cumprod[500] * schedule.alphas_cumprod[501])
    np.testing.assert_allclose(alpha**2, between, rtol=1e-5)
    np.testing.assert_allclose(sigma**2, 1 - between, rtol=1e-5)


def test_posterior_is_bayes_rule():
    x0, x_t, t = normal(0, 3, 1, 1, 2), normal(1, 3, 1, 1, 2), np.array([1, 400, 999])
    mean, variance, log_variance = diffusion.posterior(SD, x0, x_t, jnp.asarray(t))
    for row, now in enumerate(t):
        beta, before = SD.betas[now], SD.alphas_cumprod[now - 1]
        # N(sqrt(before) x0, 1 - before) for x_{t-1}, times the likelihood of x_t given x_{t-1}.
        precision = 1 / (1 - before) + (1 - beta) / beta
        pull = np.sqrt(before) * x0[row] / (1 - before) + np.sqrt(1 - beta) * x_t[row] / beta
        np.testing.assert_allclose(mean[row], pull / precision, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(variance[row].item(), 1 / precision, rtol=1e-6)
        np.testing.assert_allclose(log_variance[row].item(), -np.log(precision), rtol=1e-6)


def test_posterior_of_the_last_step_is_the_image():
    x0, x_t = normal(0, 1, 2, 2, 1), normal(1, 1, 2, 2, 1)
    mean, variance, log_variance = diffusion.posterior(SD, x0, x_t, jnp.array([0]))
    np.testing.assert_allclose(mean, x0, rtol=1e-6)
    assert variance.item() == 0
    np.testing.assert_allclose(log_variance.item(), np.log(1e-20), rtol=1e-6)


def test_offset_noise_is_constant_over_an_image_and_channel():
    noise, offset = normal(0, 2, 3, 3, 4), normal(1, 2, 4)
    added = diffusion.add_offset(noise, offset, 0.1) - noise
    for h, w in ((0, 0), (1, 2)):
        np.testing.assert_allclose(added[:, h, w], 0.1 * offset, atol=1e-6)


def test_noise_of_a_row_ignores_the_batch():
    keys = jax.random.split(jax.random.key(0), 5)
    batch = diffusion.rowwise_normal(keys, (4, 4, 1))
    np.testing.assert_array_equal(diffusion.rowwise_normal(keys[3:4], (4, 4, 1))[0], batch[3])
    assert not np.array_equal(batch[0], batch[1])


# --- parameterizations --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "alpha"),
    [
        (p, a)
        for p in diffusion.PREDICTIONS
        for a in (0.0, 0.1, 0.8, 1.0)
        if (p, a) not in {("eps", 0.0), ("x0", 1.0)}  # the prediction says nothing of the other
    ],
)
def test_prediction_goes_to_x0_and_noise_and_back(prediction, alpha):
    x0, eps = normal(0, 2, 4, 4, 3), normal(1, 2, 4, 4, 3)
    alpha, sigma = np.float32(alpha), np.float32(np.sqrt(1 - alpha**2))
    out = diffusion.target(prediction, x0, eps, alpha, sigma)
    denoised = diffusion.to_denoised(prediction, alpha * x0 + sigma * eps, out, alpha, sigma)
    np.testing.assert_allclose(denoised.x0, x0, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(denoised.eps, eps, rtol=1e-5, atol=2e-5)
    again = diffusion.target(prediction, *denoised, alpha, sigma)
    np.testing.assert_allclose(again, out, atol=3e-5)


def test_v_target_is_the_velocity():
    x0, eps, angle, d = normal(0, 8), normal(1, 8), 0.7, 1e-3
    at = lambda a: np.cos(a) * x0 + np.sin(a) * eps  # noqa: E731
    slope = (at(angle + d) - at(angle - d)) / (2 * d)
    v = diffusion.target("v", x0, eps, np.cos(angle), np.sin(angle))
    np.testing.assert_allclose(v, slope, atol=1e-4)


def test_denoiser_calls_the_model_with_a_batch_of_timesteps():
    seen = []

    def model(x, t_b):
        seen.append((t_b.shape, t_b.dtype))
        return (t_b[:, None, None, None] * jnp.ones_like(x)).astype(jnp.bfloat16)

    level = SimpleNamespace(t=jnp.int32(3), alpha=jnp.float32(0.6), sigma=jnp.float32(0.8))
    denoised = diffusion.denoiser(model, "eps")(jnp.ones((2, 1, 1, 1)), level)
    assert seen == [((2,), jnp.int32)]
    assert denoised.x0.dtype == denoised.eps.dtype == jnp.float32
    np.testing.assert_allclose(denoised.x0, (1 - 0.8 * 3) / 0.6, rtol=1e-6)
    with pytest.raises(ValueError, match="'epsilon' is not one of eps, x0, v"):
        diffusion.denoiser(model, "epsilon")


def test_clipped_x0_comes_with_its_noise():
    level = SimpleNamespace(t=0, alpha=0.6, sigma=0.8)
    x = jnp.array([0.6, 2.6])
    clipped = diffusion.clip_x0(lambda x, level: Denoised((x - 0.8) / 0.6, jnp.ones_like(x)))
    x0, eps = clipped(x, level)
    np.testing.assert_allclose(x0, [-1 / 3, 1.0], rtol=1e-6)
    np.testing.assert_allclose(eps, [1.0, 2.5], rtol=1e-6)


# --- training losses ----------------------------------------------------------------------------


def test_vlb_weights_by_hand():
    betas, before = SD.betas, 1.0
    eps, x0 = [], []
    for beta in betas:
        now = before * (1 - beta)
        variance = beta * (1 - before) / (1 - now)
        eps.append(beta**2 / (2 * variance * (1 - beta) * (1 - now)) if variance else np.nan)
        x0.append(0.5 * np.sqrt(now) / (2 - now))
        before = now
    eps[0], x0[0] = eps[1], x0[1]
    np.testing.assert_allclose(diffusion.vlb_weights(SD, "eps"), eps, rtol=1e-9)
    np.testing.assert_allclose(diffusion.vlb_weights(SD, "x0"), x0, rtol=1e-9)
    np.testing.assert_array_equal(diffusion.vlb_weights(SD, "v"), np.ones(1000))
    # That eps term is a KL divergence: |difference of posterior means|^2 over twice the variance.
    t, error = jnp.array([300]), normal(0, 1, 2, 2, 1)
    alpha, sigma = diffusion.signal_and_noise(SD, t, 4)
    zero = jnp.zeros_like(error)
    true, variance, _ = diffusion.posterior(SD, zero, zero, t)
    guess, _, _ = diffusion.posterior(SD, -sigma / alpha * error, zero, t)
    kl = np.sum((true - guess) ** 2) / (2 * variance.item())
    np.testing.assert_allclose(kl, eps[300] * np.sum(error**2), rtol=1e-4)


@pytest.mark.parametrize("schedule", [SD, diffusion.zero_terminal_snr(SD)], ids=["sd", "ztsnr"])
def test_min_snr_is_one_weight_in_three_spaces(schedule):
    ac = schedule.alphas_cumprod
    snr = ac / (1 - ac)
    of_x0 = diffusion.min_snr_weights(schedule, "x0", 5.0)
    np.testing.assert_allclose(of_x0, np.where(snr < 5, snr, 5.0))
    # An error e in x0 is an error sqrt(snr) e in eps, and alpha sqrt(snr) e + sigma e in v.
    of_eps = diffusion.min_snr_weights(schedule, "eps", 5.0)
    np.testing.assert_allclose(of_eps * snr, of_x0)
    in_v = np.sqrt(ac) * np.sqrt(snr) + np.sqrt(1 - ac)
    of_v = diffusion.min_snr_weights(schedule, "v", 5.0)
    np.testing.assert_allclose(of_v * in_v**2, of_x0, rtol=1e-9)
    assert of_eps[-1] == 1
    assert np.all(np.isfinite(of_eps))


def loss_of(config, error=None, logvar=None, t=(1, 400, 998)):
    """training_loss of a prediction that is off by `error` [3, 2, 2, 1]."""
    schedule, t = diffusion.from_config(config), jnp.array(t)
    x0, noise = normal(0, 3, 2, 2, 1), normal(1, 3, 2, 2, 1)
    alpha, sigma = diffusion.signal_and_noise(schedule, t, 4)
    out = diffusion.target(config.prediction, x0, noise, alpha, sigma)
    out = out if error is None else out + error
    return diffusion.training_loss(schedule, config, out, x0, noise, t, logvar)


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_loss_of_the_truth_is_zero(prediction):
    config = schema.DiffusionConfig(prediction=prediction, elbo_weight=1.0, min_snr_gamma=5.0)
    np.testing.assert_array_equal(loss_of(config)[0], np.zeros(3))


def test_simple_loss_is_a_mean_per_row():
    error = normal(2, 3, 2, 2, 1)
    loss, metrics = loss_of(schema.DiffusionConfig(), error)
    np.testing.assert_allclose(loss, np.mean(error**2, (1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_simple"], np.mean(error**2), rtol=1e-5)
    loss, _ = loss_of(schema.DiffusionConfig(loss="l1"), error)
    np.testing.assert_allclose(loss, np.mean(np.abs(error), (1, 2, 3)), rtol=1e-5)


def test_loss_adds_up():
    error, logvar = normal(2, 3, 2, 2, 1), normal(3, 1000)
    config = schema.DiffusionConfig(
        prediction="v", simple_weight=0.5, elbo_weight=0.1, min_snr_gamma=5.0, learn_logvar=True
    )
    loss, metrics = loss_of(config, error, logvar)
    simple, t = np.mean(error**2, (1, 2, 3)), np.array([1, 400, 998])
    weight = diffusion.min_snr_weights(SD, "v", 5.0)[t]
    expected = 0.5 * (weight * simple / np.exp(logvar[t]) + logvar[t]) + 0.1 * simple
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_vlb"], np.mean(simple), rtol=1e-5)
    np.testing.assert_allclose(metrics["logvar"], np.mean(logvar), rtol=1e-5)


def test_vlb_is_weighted_by_timestep():
    error = np.ones((3, 2, 2, 1), np.float32)
    loss, _ = loss_of(schema.DiffusionConfig(simple_weight=0.0, elbo_weight=2.0), error)
    expected = 2 * diffusion.vlb_weights(SD, "eps")[[1, 400, 998]]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_constant_logvar_and_its_optimum():
    error = normal(2, 3, 2, 2, 1)
    simple, _ = loss_of(schema.DiffusionConfig(), error)
    loss, metrics = loss_of(schema.DiffusionConfig(logvar_init=0.5), error)
    np.testing.assert_allclose(loss, simple * np.exp(-0.5) + 0.5, rtol=1e-5)
    assert "logvar" not in metrics
    # A learned log-variance settles where it equals the log of its timestep's loss.
    config = schema.DiffusionConfig(learn_logvar=True)
    settled = jnp.zeros(1000).at[jnp.array([1, 400, 998])].set(jnp.log(simple))
    slope = jax.grad(lambda logvar: jnp.sum(loss_of(config, error, logvar)[0]))(settled)
    np.testing.assert_allclose(slope, np.zeros(1000), atol=1e-6)
    with pytest.raises(ValueError, match="learn_logvar=True needs"):
        loss_of(config, error)


def test_loss_is_float32_under_a_bfloat16_model():
    config = schema.DiffusionConfig()
    x0 = jnp.zeros((1, 2, 2, 1))
    out = jnp.full(x0.shape, 1.0, jnp.bfloat16)
    noise = jnp.full(x0.shape, 1.001)
    loss, _ = diffusion.training_loss(SD, config, out, x0, noise, jnp.array([5]))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 1e-6, rtol=1e-3)
