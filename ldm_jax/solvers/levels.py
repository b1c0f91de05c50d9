"""The noise levels of a trajectory from noise to image: a table made in float64 on the host."""

from typing import Literal, NamedTuple

import numpy as np

from ldm_jax.diffusion import Schedule, log_alphas_cumprod

Spacing = Literal[
    "leading", "trailing", "linspace", "quadratic", "time_uniform", "karras", "exponential"
]
Final = Literal["alphas_cumprod_0", "one"]

# The default end of each spacing. The reference's DDIM and DPM-Solver end at the noise level of the
# first timestep; "trailing" and "linspace" may call the model at that timestep itself, from where
# only a step to no noise is left; k-diffusion appends sigma = 0 to "karras" and "exponential".
FINAL: dict[str, Final] = {
    "leading": "alphas_cumprod_0",
    "quadratic": "alphas_cumprod_0",
    "time_uniform": "alphas_cumprod_0",
    "trailing": "one",
    "linspace": "one",
    "karras": "one",
    "exponential": "one",
}

PURE = 1e-30  # alpha^2 and sigma^2 count as at least this where their logarithm is taken


class Levels(NamedTuple):
    """The steps of a trajectory, in order: float32 [S] each; whole timesteps are int32.

    One row of it, scalars inside the scan, is the `level` that `denoise` and `Solver.step` see.
    """

    t: np.ndarray
    """Timestep that the model is called at."""
    alpha: np.ndarray
    """sqrt(alphas_cumprod) at t."""
    sigma: np.ndarray
    """sqrt(1 - alphas_cumprod) at t."""
    alpha_next: np.ndarray
    """alpha at the next level."""
    sigma_next: np.ndarray
    """sigma at the next level."""
    beta: np.ndarray
    """1 - (alpha / alpha_next)^2, the forward step's variance; float32 alphas would lose it."""
    h: np.ndarray
    """Increase of log(alpha / sigma) in the step; finite: alpha or sigma = 0 counts as 1e-15."""
    t_next: np.ndarray
    """Timestep of the next level; 0 at the end."""
    t_mid: np.ndarray
    """Timestep, fractional, of the level halfway in log(alpha / sigma)."""
    alpha_mid: np.ndarray
    """alpha there."""
    sigma_mid: np.ndarray
    """sigma there; without meaning in a step from pure noise or to none."""
    weights: np.ndarray | None = None
    """[S, ...]: result of `Solver.weights` for the columns above."""
    number: np.ndarray | None = None
    """Number of the step, int32, from 0 on: `sample` gives it."""


def levels(
    schedule: Schedule,
    steps: int,
    spacing: Spacing = "leading",
    final: Final | None = None,
    offset: int = 1,
) -> Levels:
    """The levels of `steps` steps over a schedule of T timesteps.

    leading: every T//steps, plus `offset`, the reference's DDIM: ceil(T / (T//steps)) levels, 31
        for 30.
    trailing: exactly `steps` for any 1..T, from T-1 down (Lin et al. 2023, table 2).
    linspace: exactly `steps`, both ends of the schedule included.
    quadratic: the reference's `quad`, denser near the image; many steps repeat timestep 1.
    time_uniform: the reference's DPM-Solver: fractional, log alphas_cumprod interpolated.
    karras: from T-1 to 0, uniform in (sigma / alpha)^(1/7) (Karras et al. 2022, eq. 5); fractional.
    exponential: likewise, uniform in log(sigma / alpha).
    final: alphas_cumprod at the end of the last step, alphas_cumprod[0] or 1 (no noise);
        default: `FINAL`.
    ValueError when steps are not in 1..T, or when the reference's rule starts beyond T-1.
    """
    timesteps = len(schedule.alphas_cumprod)
    if spacing not in FINAL:
        raise ValueError(f"spacing {spacing!r} is not one of {', '.join(FINAL)}")
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps={steps} is not in 1..{timesteps}, the schedule's timesteps")
    final = FINAL[spacing] if final is None else final
    if final not in ("alphas_cumprod_0", "one"):
        raise ValueError(f"final {final!r} is not one of alphas_cumprod_0, one")

    if spacing in ("karras", "exponential"):
        now = _by_noise(spacing, steps, schedule, final)
        t = _timestep_of(schedule, now)
    else:
        t = _timesteps(spacing, steps, timesteps, offset)
        if t[0] >= timesteps:
            raise ValueError(
                f"steps={steps} with spacing {spacing!r} starts at timestep {t[0]}, but the last"
                f" one is {timesteps - 1}; use another number of steps or spacing 'trailing'"
            )
        now = _alphas_cumprod(schedule, t)
    end = schedule.alphas_cumprod[0] if final == "alphas_cumprod_0" else 1.0
    return table(schedule, t, now, np.append(now[1:], end))


def inverted(levels: Levels) -> Levels:
    """The levels in reverse, from image to noise, for a solver without noise of its own.

    With "ddim" this is DDIM inversion (Song et al. 2021, section 4.3; Dhariwal and Nichol 2021,
    appendix F): `x_T = sample(solver, denoise, inverted(levels), x_0, keys)`. Sampling over
    `levels` then returns x_0, up to an error that shrinks with the steps as the solver's own.
    ValueError for levels that end in no noise: no model has been trained there.
    """
    if levels.sigma_next[-1] == 0:
        raise ValueError(
            "inversion starts where sampling ends, and these levels end in no noise: make them with"
            " final='alphas_cumprod_0'"
        )
    back = Levels(*(column[::-1] for column in levels if column is not None))
    return back._replace(
        t=back.t_next,
        alpha=back.alpha_next,
        sigma=back.sigma_next,
        alpha_next=back.alpha,
        sigma_next=back.sigma,
        beta=-back.beta / (1 - back.beta),
        h=-back.h,
        t_next=back.t,
    )


def table(schedule: Schedule, t: np.ndarray, now: np.ndarray, following: np.ndarray) -> Levels:
    """Levels at t with these alphas_cumprod, each leading to the `following` one."""
    lam, lam_next = _half_log_snr(now), _half_log_snr(following)
    middle = 1 / (1 + np.exp(-lam - lam_next))  # alpha^2 where log(alpha / sigma) is their mean
    t_next = np.append(t[1:], np.zeros(1, t.dtype))
    kind = np.int32 if t.dtype.kind == "i" else np.float32
    columns = (
        *(np.sqrt(now), np.sqrt(1 - now), np.sqrt(following), np.sqrt(1 - following)),
        *(1 - now / following, lam_next - lam, t_next, _timestep_of(schedule, middle)),
        *(np.sqrt(middle), np.sqrt(1 - middle)),
    )
    made = Levels(*(a.astype(np.float32) for a in (t, *columns)))
    return made._replace(t=t.astype(kind), t_next=t_next.astype(kind))


def _half_log_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """log(alpha / sigma), finite."""
    return 0.5 * np.log(np.maximum(alphas_cumprod, PURE) / np.maximum(1 - alphas_cumprod, PURE))


def _by_noise(spacing: Spacing, steps: int, schedule: Schedule, final: Final) -> np.ndarray:
    """alphas_cumprod of levels spread over sigma / alpha, the noise level of k-diffusion.

    They reach timestep 0 as the last level, or as the end of the last step. A schedule that ends
    in pure noise starts at sigma / alpha = 4096 (alphas_cumprod 2^-24, as in diffusers).
    """
    ends = np.maximum(schedule.alphas_cumprod[[-1, 0]], 2.0**-24)
    high, low = np.sqrt((1 - ends) / ends)
    ramp = np.linspace(0, 1, steps if final == "one" else steps + 1)[:steps]
    if spacing == "karras":
        noise = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    else:
        noise = high * (low / high) ** ramp
    return 1 / (1 + noise**2)


def _timesteps(spacing: Spacing, steps: int, timesteps: int, offset: int) -> np.ndarray:
    """Descending timesteps, int64 or (fractional) float64."""
    if spacing == "leading":  # make_ddim_timesteps("uniform")
        return np.arange(0, timesteps, timesteps // steps)[::-1] + offset
    if spacing == "quadratic":  # make_ddim_timesteps("quad")
        root = np.linspace(0, np.sqrt(timesteps * 0.8), steps)
        return (root**2).astype(np.int64)[::-1] + 1
    if spacing == "trailing":
        return np.round(timesteps - np.arange(steps) * timesteps / steps).astype(np.int64) - 1
    if spacing == "linspace":
        return np.round(np.linspace(timesteps - 1, 0, steps)).astype(np.int64)
    return np.linspace(timesteps - 1, 0, steps + 1)[:-1]


def _alphas_cumprod(schedule: Schedule, t: np.ndarray) -> np.ndarray:
    if t.dtype.kind == "i":
        return schedule.alphas_cumprod[t]
    log = log_alphas_cumprod(schedule)
    return np.exp(np.interp(t, np.arange(len(log)), log))


def _timestep_of(schedule: Schedule, alphas_cumprod: np.ndarray) -> np.ndarray:
    """Inverse of `_alphas_cumprod`, within 0..T-1; fractional."""
    log = np.maximum(log_alphas_cumprod(schedule), np.log(2.0**-24))
    return np.interp(-np.log(np.maximum(alphas_cumprod, PURE)), -log, np.arange(len(log)))
