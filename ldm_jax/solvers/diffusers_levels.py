"""Levels as the schedulers of diffusers space them, for any number of steps.

Each of their classes has a rule of its own. Ours are named by the solvers that they belong to:

    ddim, plms, ddpm   whole timesteps; every T // steps ("leading"), both ends ("linspace")
    euler, ..., lms    as k-diffusion: fractional timesteps, sigma / alpha interpolated ("linspace")
    dpmpp_2m, ...      whole timesteps of one step more, the last of which is left out

"trailing" is the same for all: from T - 1 down, every T / steps.
"""

import numpy as np

from ldm_jax.diffusion import Schedule
from ldm_jax.solvers.levels import FINAL, Final, Levels, table

SPACINGS = ("leading", "trailing", "linspace")
BY_SIGMA = ("euler", "euler_ancestral", "heun", "lms", "kdpm2")
MULTISTEP = ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_2s", "unipc", "deis")
LEAST = 2.0**-24  # alphas_cumprod that their schedulers give to pure noise


def diffusers_levels(
    schedule: Schedule, steps: int, spacing: str, final: Final | None, offset: int, solver: str
) -> Levels:
    """The levels of `steps` steps; offset: `steps_offset`. Source: `set_timesteps` of each class.

    final: what a last step of "ddim" and "plms" leads to (`set_alpha_to_one`); those of the other
    solvers lead to no noise, as their classes do. A solver that is none of these has the timesteps
    of "ddim". ValueError for a number of steps that the rule cannot make, in which case diffusers
    stops, or samples NaN.
    """
    final = FINAL[spacing] if final is None else final
    last = len(schedule.alphas_cumprod) - 1
    if not 1 <= steps <= last + 1:
        raise ValueError(f"steps={steps} is not in 1..{last + 1}, the schedule's timesteps")
    t = _timesteps(last + 1, steps, spacing, offset, solver)
    by_sigma = solver in BY_SIGMA + MULTISTEP
    if (np.diff(t) >= 0).any() or (t[0] > last and not by_sigma):
        raise ValueError(
            f"steps={steps} with spacing {spacing!r} of {solver} has no such timesteps in diffusers"
            f" ({t[0]:g} to {t[-1]:g} of 0..{last}); use fewer steps or spacing 'trailing'"
        )
    if by_sigma:
        given = np.maximum(schedule.alphas_cumprod, LEAST)
        # beyond the last timestep, where steps_offset may lead, there is its own sigma
        sigma = np.interp(t, np.arange(last + 1), np.sqrt((1 - given) / given))
        now = 1 / (1 + sigma**2)
        return table(schedule, t, now, np.append(now[1:], 1.0))
    now, end = schedule.alphas_cumprod[t], 1.0
    if final == "alphas_cumprod_0" and solver != "ddpm":
        end = schedule.alphas_cumprod[0]
    if solver not in ("ddim", "plms"):
        return table(schedule, t, now, np.append(now[1:], end))
    # DDIMScheduler.step and PNDMScheduler.step go back by T // steps, whatever the next timestep is
    previous = t - (last + 1) // steps
    previous, over = np.maximum(previous, 0), previous < 0
    made = table(schedule, t, now, np.where(over, end, schedule.alphas_cumprod[previous]))
    # the second call of "plms" is at the next timestep of the list
    return made if solver == "plms" else made._replace(t_next=previous.astype(np.int32))


def _timesteps(count: int, steps: int, spacing: str, offset: int, solver: str) -> np.ndarray:
    """Descending timesteps of 0..count - 1, int64 or (fractional) float32."""
    if spacing == "trailing":
        # as floats go, their arange has one more element for some steps: timestep -1
        return np.arange(count, 0, -count / steps)[:steps].round().astype(np.int64) - 1
    more = 1 if solver in MULTISTEP else 0
    if spacing == "leading":
        ratio = count // (steps + more)
        return (np.arange(steps + more) * ratio)[::-1][:steps] + offset
    if solver in BY_SIGMA:
        return np.linspace(0, count - 1, steps, dtype=np.float32)[::-1]
    spread = np.linspace(0, count - 1, steps + more).round().astype(np.int64)
    return spread[::-1][:steps]
