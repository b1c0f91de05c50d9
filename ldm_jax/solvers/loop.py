"""The one scan that drives every solver."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import Denoised
from ldm_jax.solvers.levels import Levels


class Solver(NamedTuple):
    """A sampler as two pure functions; what it remembers between steps is its carry."""

    init: Callable[[jax.Array], Any]
    """x_T -> carry."""
    step: Callable[..., tuple[Any, jax.Array, jax.Array]]
    """(denoise, carry, x, level, keys [B]) -> (carry, next x, x0 predicted at this level)."""


def sample(
    solver: Solver,
    denoise: Callable[[jax.Array, Any], Denoised],
    levels: Levels,
    x_T: jax.Array,
    keys: jax.Array,
    *,
    start: jax.Array | int = 0,
) -> jax.Array:
    """x_0 [B, h, w, c] from x_T, unit normal float32 of the same shape.

    keys: typed keys [B]; the noise of a row depends on its own key and the level alone (with JAX's
    default generator, threefry). start: first level that runs, x_T being at that level's noise; a
    Python int cuts the table, a traced one skips through `lax.cond`, so that changing it does not
    recompile.
    """
    return _scan(solver, denoise, levels, x_T, keys, start, keep=False)[0]


def trajectory(
    solver: Solver,
    denoise: Callable[[jax.Array, Any], Denoised],
    levels: Levels,
    x_T: jax.Array,
    keys: jax.Array,
    *,
    start: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array]:
    """`sample`, and beside x_0 the x0 predicted at each level that ran, [S, B, h, w, c].

    With a traced `start` the rows of skipped levels hold x_T.
    """
    return _scan(solver, denoise, levels, x_T, keys, start, keep=True)


def _scan(solver, denoise, levels, x_T, keys, start, keep):
    count = len(levels.t)
    first = 0
    if isinstance(start, int | np.integer):
        if not 0 <= start <= count:
            raise ValueError(f"start={start} is not in 0..{count}, the number of levels")
        levels = Levels(*(column[start:] for column in levels))
        first = start

    def run(i, level, carry, x):
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        return solver.step(denoise, carry, x, level, step_keys)

    def skip(i, level, carry, x):
        del i, level
        return carry, x, x

    def body(state, indexed_level):
        i, level = indexed_level
        if isinstance(start, int | np.integer):
            carry, x, x0 = run(i, level, *state)
        else:
            carry, x, x0 = jax.lax.cond(i >= start, run, skip, i, level, *state)
        return (carry, x), x0 if keep else None

    indices = jnp.arange(first, count)
    (_, x), x0s = jax.lax.scan(body, (solver.init(x_T), x_T), (indices, levels))
    return x, x0s
