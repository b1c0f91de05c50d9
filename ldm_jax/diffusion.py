"""The diffusion process: noise schedules, noising, posterior, parameterizations, training losses.

alpha = sqrt(alphas_cumprod) scales the signal and sigma = sqrt(1 - alphas_cumprod) the noise; t is
an index in [0, T). Tables are float64 NumPy arrays on the host, closed over, and reach the device
in float32. "Reference" is CompVis/latent-diffusion, `ldm/models/diffusion/ddpm.py` and
`ldm/modules/diffusionmodules/util.py`.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import schema
from ldm_jax.schema import sizes as config_sizes

ScheduleKind = Literal["scaled_linear", "linear", "cosine", "sqrt"]
Prediction = Literal["eps", "x0", "v"]

DEFAULT_BETAS = (8.5e-4, 0.012)  # Stable Diffusion's
PREDICTIONS = ("eps", "x0", "v")


class Schedule(NamedTuple):
    """Noise levels of the forward process, indexed by timestep; float64 NumPy arrays, [T] each."""

    betas: np.ndarray
    alphas_cumprod: np.ndarray


class Denoised(NamedTuple):
    """Predicted clean batch and noise of a noised batch, [B, ...] each."""

    x0: jax.Array
    eps: jax.Array


# --- schedules ----------------------------------------------------------------------------------


def make_schedule(
    kind: ScheduleKind,
    timesteps: int = 1000,
    beta_start: float | None = None,
    beta_end: float | None = None,
) -> Schedule:
    """A noise schedule of T timesteps (`make_beta_schedule`).

    Our "scaled_linear" is the reference's "linear", our "linear" its "sqrt_linear".
    Betas default to 8.5e-4 and 0.012; "cosine" (Nichol and Dhariwal 2021, eq. 17) has none.
    ValueError on a bad argument.
    """
    if timesteps < 2:
        raise ValueError(f"timesteps={timesteps}: a schedule needs at least 2")
    if kind == "cosine":
        if (beta_start, beta_end) != (None, None):
            raise ValueError(
                f"the cosine schedule takes no betas, got beta_start={beta_start},"
                f" beta_end={beta_end}: set both to None"
            )
        # alphas_cumprod(t) = f(t) / f(0), f(t) = cos^2(((t/T + s) / (1 + s)) pi/2), s = 0.008;
        # betas are clipped at 0.999 (eq. 17 and below), so that the last level keeps some signal
        angle = (np.arange(timesteps + 1) / timesteps + 8e-3) / (1 + 8e-3) * np.pi / 2
        signal = np.cos(angle) ** 2
        return _from_betas(np.clip(1 - signal[1:] / signal[:-1], 0, 0.999))
    start = DEFAULT_BETAS[0] if beta_start is None else beta_start
    end = DEFAULT_BETAS[1] if beta_end is None else beta_end
    if not 0 < start <= end < 1:
        raise ValueError(
            f"beta_start={start}, beta_end={end}: needed is 0 < beta_start <= beta_end < 1"
        )
    if kind == "scaled_linear":
        return _from_betas(np.linspace(start**0.5, end**0.5, timesteps) ** 2)
    if kind == "linear":
        return _from_betas(np.linspace(start, end, timesteps))
    if kind == "sqrt":
        return _from_betas(np.linspace(start, end, timesteps) ** 0.5)
    raise ValueError(f"schedule {kind!r} is not one of scaled_linear, linear, cosine, sqrt")


def _from_betas(betas: np.ndarray) -> Schedule:
    return Schedule(betas, np.cumprod(1 - betas))


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """The schedule stretched so that it ends in pure noise (Lin et al. 2023, algorithm 1)."""
    alpha = np.sqrt(schedule.alphas_cumprod)
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    alphas_cumprod = alpha**2
    betas = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
    return Schedule(betas, alphas_cumprod)


def from_config(config: schema.DiffusionConfig) -> Schedule:
    """The schedule of a config. ValueError when it and the prediction exclude each other."""
    config_sizes.check(config, "diffusion")
    if config.zero_terminal_snr and config.prediction == "eps":
        raise ValueError(
            "zero_terminal_snr=True with prediction='eps': at the last level the noise says"
            " nothing about the image; use prediction 'v' or 'x0'"
        )
    schedule = make_schedule(config.schedule, config.timesteps, config.beta_start, config.beta_end)
    return zero_terminal_snr(schedule) if config.zero_terminal_snr else schedule


def signal_and_noise(schedule: Schedule, t: jax.Array, ndim: int) -> tuple[jax.Array, jax.Array]:
    """alpha and sigma at t [B], float32 [B, 1, ...] with `ndim` axes.

    Between two timesteps log alphas_cumprod is linear, as DPM-Solver has it (`NoiseScheduleVP`).
    """
    table = schedule.alphas_cumprod
    # From the float64 table on the host: 1 - alphas_cumprod would lose half its digits in float32.
    if jnp.issubdtype(t.dtype, jnp.integer):
        alpha, sigma = _at(np.sqrt(table), t), _at(np.sqrt(1 - table), t)
    else:
        known = log_alphas_cumprod(schedule).astype(np.float32)
        log = jnp.interp(t, np.arange(len(table), dtype=np.float32), known)
        alpha, sigma = jnp.exp(0.5 * log), jnp.sqrt(-jnp.expm1(log))
    return append_dims(alpha, ndim), append_dims(sigma, ndim)


def log_alphas_cumprod(schedule: Schedule) -> np.ndarray:
    """log alphas_cumprod, float64 [T], interpolated between timesteps; alpha = 0 counts as
    1e-15."""
    return np.log(np.maximum(schedule.alphas_cumprod, 1e-30))


def _at(table: np.ndarray, t: jax.Array) -> jax.Array:
    """Rows of a host table at timesteps [B], float32 [B]; a fractional t takes the row below."""
    return jnp.asarray(table.astype(np.float32))[t.astype(jnp.int32)]


def append_dims(value: jax.Array | float, ndim: int) -> jax.Array:
    """A scalar as it is, [B] as [B, 1, ...] with `ndim` axes."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (ndim - 1)) if value.ndim else value


# --- forward process and posterior --------------------------------------------------------------


def q_sample(schedule: Schedule, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """x_t ~ q(x_t | x_0), Ho et al. 2020, eq. 4; x0 and noise [B, ...], t [B] int or float32."""
    alpha, sigma = signal_and_noise(schedule, t, x0.ndim)
    return alpha * x0 + sigma * noise


def posterior(
    schedule: Schedule, x0: jax.Array, x_t: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean [B, ...], variance and log-variance [B, 1, ...] of q(x_{t-1} | x_t, x_0) at int t [B].

    Ho et al. 2020, eq. 6-7. The variance is 0 at t = 0; the log-variance is that of at least 1e-20,
    as in the reference.
    """
    previous = _previous(schedule)
    noise = 1 - schedule.alphas_cumprod
    # mean = sqrt(ac_{t-1}) beta_t / (1 - ac_t) x_0 + (1 - ac_{t-1}) sqrt(1 - beta_t) / (1 - ac_t)
    # x_t
    of_x0 = schedule.betas * np.sqrt(previous) / noise
    of_x_t = (1 - previous) * np.sqrt(1 - schedule.betas) / noise
    variance = posterior_variance(schedule)
    c0, ct, var, log_var = (
        append_dims(_at(table, t), x0.ndim)
        for table in (of_x0, of_x_t, variance, np.log(np.maximum(variance, 1e-20)))
    )
    return c0 * x0 + ct * x_t, var, log_var


def posterior_variance(schedule: Schedule) -> np.ndarray:
    """Variance of q(x_{t-1} | x_t, x_0) for every t, float64 [T]; Ho et al. 2020, eq. 7."""
    return schedule.betas * (1 - _previous(schedule)) / (1 - schedule.alphas_cumprod)


def _previous(schedule: Schedule) -> np.ndarray:
    return np.append(1.0, schedule.alphas_cumprod[:-1])


def add_offset(noise: jax.Array, offset_bc: jax.Array, strength: float) -> jax.Array:
    """Noise [B, h, w, c] plus `strength` times a unit normal that is constant over h and w.

    N. Guttenberg, "Diffusion with offset noise", 2023.
    """
    return noise + strength * offset_bc[:, None, None, :]


def rowwise_normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Unit normal [B, *shape]; row i depends on keys[i] alone, not on the batch it is drawn in.

    In place of keys [B], numbers [B, *shape] that were drawn elsewhere come back.
    """
    if not jax.dtypes.issubdtype(keys.dtype, jax.dtypes.prng_key):
        return keys
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


# --- parameterizations --------------------------------------------------------------------------


def x0_from_eps(x, eps, alpha, sigma):
    """Ho et al. 2020, eq. 15; the one conversion that divides by alpha."""
    return (x - sigma * eps) / alpha


def eps_from_x0(x, x0, alpha, sigma):
    """Inverse of `x0_from_eps`."""
    return (x - alpha * x0) / sigma


def v_from_eps(eps, x0, alpha, sigma):
    """v = alpha eps - sigma x0 (Salimans and Ho 2022, appendix D)."""
    return alpha * eps - sigma * x0


def eps_from_v(x, v, alpha, sigma):
    """eps = sigma x + alpha v (Salimans and Ho 2022, appendix D)."""
    return sigma * x + alpha * v


def x0_from_v(x, v, alpha, sigma):
    """x0 = alpha x - sigma v (Salimans and Ho 2022, appendix D)."""
    return alpha * x - sigma * v


def target(
    prediction: Prediction, x0: jax.Array, noise: jax.Array, alpha: Any, sigma: Any
) -> jax.Array:
    """Training target of a model of this prediction type."""
    if prediction == "eps":
        return noise
    if prediction == "x0":
        return x0
    return v_from_eps(noise, x0, alpha, sigma)


def to_denoised(
    prediction: Prediction, x: jax.Array, out: jax.Array, alpha: Any, sigma: Any
) -> Denoised:
    """x0 and noise from the raw prediction; only x0 from eps divides by alpha."""
    if prediction == "eps":
        return Denoised(x0_from_eps(x, out, alpha, sigma), out)
    if prediction == "x0":
        return Denoised(out, eps_from_x0(x, out, alpha, sigma))
    return Denoised(x0_from_v(x, out, alpha, sigma), eps_from_v(x, out, alpha, sigma))


def denoiser(model: Callable, prediction: Prediction) -> Callable[[jax.Array, Any], Denoised]:
    """`denoise(x, level)` from `model(x, t_b)`; a level is a row of `solvers.Levels`."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction {prediction!r} is not one of {', '.join(PREDICTIONS)}")

    def denoise(x, level):
        out = model(x, jnp.broadcast_to(level.t, x.shape[:1])).astype(x.dtype)
        return to_denoised(prediction, x, out, level.alpha, level.sigma)

    return denoise


def clip_x0(denoise: Callable, limit: float = 1.0) -> Callable[[jax.Array, Any], Denoised]:
    """`denoise` with x0 clipped to [-limit, limit], and the noise that goes with it."""

    def clipped(x, level):
        x0 = jnp.clip(denoise(x, level).x0, -limit, limit)
        return Denoised(x0, eps_from_x0(x, x0, level.alpha, level.sigma))

    return clipped


# --- training losses ----------------------------------------------------------------------------


def vlb_weights(schedule: Schedule, prediction: Prediction) -> np.ndarray:
    """Weights of the squared error in the variational bound, float64 [T] (`lvlb_weights`).

    The reference's, oddities kept: t = 0 (infinite for eps) takes the weight of t = 1 whatever the
    prediction; x0 has sqrt(ac) / 2 / (2 - ac) where 1 - ac was surely meant; v has 1 everywhere.
    """
    ac = schedule.alphas_cumprod
    if prediction == "eps":
        # beta_t^2 / (2 sigma_t^2 alpha_t (1 - ac_t)), Ho et al. 2020, eq. 12
        scale = 2 * posterior_variance(schedule) * (1 - schedule.betas) * (1 - ac)
        weights = np.append(0.0, schedule.betas[1:] ** 2 / scale[1:])
    elif prediction == "x0":
        weights = 0.5 * np.sqrt(ac) / (2.0 * 1 - ac)
    else:
        weights = np.ones_like(ac)
    weights[0] = weights[1]
    return weights


def min_snr_weights(schedule: Schedule, prediction: Prediction, gamma: float) -> np.ndarray:
    """min(SNR, gamma) as a weight on the loss of this prediction, float64 [T].

    Hang et al. 2023, section 3.4.
    """
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    if prediction == "x0":
        return np.minimum(snr, gamma)
    if prediction == "v":
        return np.minimum(snr, gamma) / (snr + 1)
    return gamma / np.maximum(snr, gamma)  # min(snr, gamma) / snr, also where snr = 0


def training_loss(
    schedule: Schedule,
    config: schema.DiffusionConfig,
    out: jax.Array,
    x0: jax.Array,
    noise: jax.Array,
    t: jax.Array,
    logvar: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of each example [B] float32, and scalar means of its parts (`p_losses`).

    out: raw prediction for q_sample(schedule, x0, t, noise), [B, h, w, c] like x0 and noise; t [B].
    logvar [T]: learned log-variances, needed with `learn_logvar`; otherwise they stay at
    `logvar_init`.
    loss = simple_weight (w_t simple / exp(logvar_t) + logvar_t) + elbo_weight vlb_t simple, with
    w_t of min-SNR; `loss_simple` is without any weight.
    """
    if config.learn_logvar and logvar is None:
        raise ValueError("learn_logvar=True needs the parameter `logvar` [timesteps]")
    alpha, sigma = signal_and_noise(schedule, t, x0.ndim)
    error = out.astype(jnp.float32) - target(config.prediction, x0, noise, alpha, sigma)
    error = jnp.abs(error) if config.loss == "l1" else error**2
    simple = jnp.mean(error, axis=tuple(range(1, error.ndim)))
    vlb = _at(vlb_weights(schedule, config.prediction), t) * simple
    metrics = {"loss_simple": jnp.mean(simple), "loss_vlb": jnp.mean(vlb)}

    loss = simple
    if config.min_snr_gamma is not None:
        loss *= _at(min_snr_weights(schedule, config.prediction, config.min_snr_gamma), t)
    if config.learn_logvar and logvar is not None:
        logvar_b = logvar[t.astype(jnp.int32)]
        loss = loss / jnp.exp(logvar_b) + logvar_b
        metrics["logvar"] = jnp.mean(logvar)
    else:
        loss = loss / np.exp(config.logvar_init) + config.logvar_init
    return config.simple_weight * loss + config.elbo_weight * vlb, metrics
