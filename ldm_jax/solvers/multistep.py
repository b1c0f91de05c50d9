"""Shared parts of the solvers that use earlier model outputs.

m is x0 or eps, m_0 at this level and m_1, m_2, ... at those before. A step is

    alpha_next x0 + sigma_next (kept eps + fresh noise) + sum_j w_j (m_j - m_0)

where the first two terms are the step of order one (DDIM), and w comes from a table made in float64
on the host: row n of a level's table is for n earlier outputs. How many there are is counted in the
carry, so that a trajectory may begin at any level.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import rowwise_normal
from ldm_jax.solvers.levels import Levels
from ldm_jax.solvers.loop import Solver


def multistep(
    order: int, of: Literal["x0", "eps"], weights: Callable[[Levels], np.ndarray], eta: float = 0.0
) -> Solver:
    """A solver from its table [S, order, order - 1], see `table`.

    eta: strength of the fresh noise, kept = exp(-eta h); at 0 there is none in the program.
    """

    def step(denoise, carry, x, level, keys):
        denoised = denoise(x, level)
        noise = denoised.eps
        if eta != 0:
            fresh = jnp.sqrt(-jnp.expm1(-2 * eta * level.h))
            noise = jnp.exp(-eta * level.h) * noise + fresh * rowwise_normal(keys, x.shape[1:])
        x = level.alpha_next * denoised.x0 + level.sigma_next * noise
        carry, change = remember(carry, level.weights, getattr(denoised, of))
        return carry, x + change, denoised

    return Solver(lambda x: empty(x, order), step, weights, noisy=eta != 0)


def empty(x: jax.Array, order: int) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The carry at the start: no earlier outputs."""
    return jnp.zeros((), jnp.int32), (jnp.zeros_like(x),) * (order - 1)


def remember(carry: Any, weights: jax.Array, now: jax.Array) -> tuple[Any, jax.Array]:
    """Return the carry with `now` added, and sum_j w_j (m_j - now) over the earlier outputs."""
    count, past = carry
    row = weights[count]
    # differences, not a plain sum of outputs: float32 rounding then scales with the change
    change = sum(row[j] * (then - now) for j, then in enumerate(past))
    return (jnp.minimum(count + 1, len(past)), (now, *past)[: len(past)]), change


def table(
    levels: Levels,
    order: int,
    weigh: Callable[[Levels, np.ndarray], np.ndarray],
    lower_below: float = 15,
) -> np.ndarray:
    """[S, order, order - 1] float64; row n of level i is weigh(level, behind), then zeros."""
    out = np.zeros((len(levels.t), order, order - 1))
    for i, n, level, behind in histories(levels, order, lower_below):
        if len(behind):
            out[i, n, : len(behind)] = weigh(level, behind)
    return out


def histories(
    levels: Levels, order: int, lower_below: float
) -> Iterator[tuple[int, int, Levels, np.ndarray]]:
    """(i, n, level i, behind) for every level i and number n < order of earlier outputs.

    behind: log(alpha / sigma) at this level minus that at the outputs that are used, nearest first:
    n of them, but fewer where levels repeat, near the end of trajectories of fewer than
    `lower_below` steps, and none in a step to no noise (the reference's `lower_order_final`);
    lower_below=0 leaves the end alone.
    """
    h = levels.h.astype(np.float64)
    steps = len(h)
    for i in range(steps):
        level = jax.tree.map(operator.itemgetter(i), levels)
        earlier = h[max(i - order + 1, 0) : i][::-1]
        most = int(np.argmax(np.append(earlier == 0, True))) if h[i] else 0
        if lower_below and level.sigma_next == 0:
            most = 0
        if steps < lower_below:
            most = min(most, steps - 1 - i)
        for n in range(order):
            yield i, n, level, np.cumsum(earlier[: min(n, most)])


def span(level: Levels) -> np.float64:
    """alpha_next (sigma_next / alpha_next - sigma / alpha): change of x per unit of slope eps."""
    # as in `levels`, alpha = 0 counts as 1e-15; expm1 keeps the digits of small steps
    noise = np.float64(level.sigma) / max(np.float64(level.alpha), 1e-15)
    return level.alpha_next * noise * np.expm1(-np.float64(level.h))
