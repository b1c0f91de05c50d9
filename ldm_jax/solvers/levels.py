"""Where a trajectory stops on its way from noise to image: a table made in float64 on the host."""

from typing import Literal, NamedTuple

import numpy as np

from ldm_jax.diffusion import Schedule, log_alphas_cumprod

Spacing = Literal["leading", "trailing", "linspace", "quadratic", "time_uniform"]
Final = Literal["alphas_cumprod_0", "one"]

# What each spacing ends at by default. The reference's DDIM and DPM-Solver end at the first
# timestep's own noise level; "trailing" and "linspace" may reach that timestep itself, from where
# the only way on is to no noise.
FINAL: dict[str, Final] = {
    "leading": "alphas_cumprod_0",
    "quadratic": "alphas_cumprod_0",
    "time_uniform": "alphas_cumprod_0",
    "trailing": "one",
    "linspace": "one",
}


class Levels(NamedTuple):
    """The steps of a trajectory, noisiest first: float32 [S] each; whole timesteps are int32.

    One row of it, scalars inside the scan, is the `level` that `denoise` and `Solver.step` see.
    """

    t: np.ndarray
    """Timestep that the model is called at."""
    alpha: np.ndarray
    """sqrt(alphas_cumprod) at t."""
    sigma: np.ndarray
    """sqrt(1 - alphas_cumprod) at t."""
    alpha_next: np.ndarray
    """alpha where the step leads to."""
    sigma_next: np.ndarray
    """sigma where the step leads to."""
    beta: np.ndarray
    """1 - (alpha / alpha_next)^2, the forward step's variance; float32 alphas would lose it."""


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
    final: what the last step leads to, alphas_cumprod[0] or 1 (no noise); default: `FINAL`.
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

    t = _timesteps(spacing, steps, timesteps, offset)
    if t[0] >= timesteps:
        raise ValueError(
            f"steps={steps} with spacing {spacing!r} starts at timestep {t[0]}, but the last one is"
            f" {timesteps - 1}; use another number of steps or spacing 'trailing'"
        )
    now = _alphas_cumprod(schedule, t)
    end = schedule.alphas_cumprod[0] if final == "alphas_cumprod_0" else 1.0
    following = np.append(now[1:], end)
    table = (np.sqrt(now), np.sqrt(1 - now), np.sqrt(following), np.sqrt(1 - following))
    t = t.astype(np.int32 if t.dtype.kind == "i" else np.float32)
    return Levels(t, *(a.astype(np.float32) for a in (*table, 1 - now / following)))


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
