"""The one `lax.scan` that drives every solver."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import Denoised
from ldm_jax.solvers.levels import Levels


class Solver(NamedTuple):
    """A sampler as two pure functions; its carry is its memory between steps."""

    init: Callable[[jax.Array], Any]
    """x_T -> carry."""
    step: Callable[..., tuple[Any, jax.Array, Denoised]]
    """(denoise, carry, x, level, keys [B]) -> (carry, x at the next level, denoised at this)."""
    weights: Callable[[Levels], np.ndarray] | None = None
    """Levels -> numbers [S, ...] made on the host, which `step` finds in `level.weights`."""
    noisy: bool = False
    """Draws noise at every step, whatever eta is: it cannot be inverted."""


def sample(
    solver: Solver,
    denoise: Callable[[jax.Array, Any], Denoised],
    levels: Levels,
    x_T: jax.Array,
    keys: jax.Array,
    *,
    start: jax.Array | int = 0,
    trace: Callable[[jax.Array, Denoised], Any] | None = None,
    remat: bool = False,
) -> Any:
    """x_0 [B, h, w, c] from x_T, unit normal float32 of the same shape.

    keys: typed keys [B]; the noise of an image depends on its own key and the level alone (with
    JAX's default generator, threefry). Or the noise of every level, [B, S, h, w, c].
    start: first level that runs, with x_T at that level's noise. A Python int cuts the table; a
    traced one skips through `lax.cond`, so that another value does not recompile.
    trace: trace(x, denoised) of every level; the result is then (x_0, traces stacked to [S, ...]).
    Levels that a traced `start` skips have x = x0 = x_T and eps = 0.
    remat: a backward pass keeps x and the carry of every level, and computes the rest again.
    ValueError for a Python `start` outside 0..S.
    """
    fixed = isinstance(start, int | np.integer)
    count = len(levels.t)
    if fixed and not 0 <= start <= count:
        raise ValueError(f"start={start} is not in 0..{count}, the number of levels")
    first = start if fixed else 0
    levels = prepared(solver, levels)
    steps = (jnp.arange(first, count), jax.tree.map(lambda column: column[first:], levels))

    def run(carry, x, i, level):
        return solver.step(denoise, carry, x, level, keys_at(keys, i))

    def skip(carry, x, i, level):
        del i, level
        return carry, x, Denoised(x, jnp.zeros_like(x))

    def body(state, step):
        if fixed:
            carry, x, denoised = run(*state, *step)
        else:
            carry, x, denoised = jax.lax.cond(step[0] >= start, run, skip, *state, *step)
        return (carry, x), None if trace is None else trace(state[1], denoised)

    if remat:  # inside a scan, XLA cannot merge the recomputation with the first computation
        body = jax.checkpoint(body, prevent_cse=False)
    (_, x), traces = jax.lax.scan(body, (solver.init(x_T), x_T), steps)
    return x if trace is None else (x, traces)


def segment(
    solver: Solver,
    denoise: Callable[[jax.Array, Any], Denoised],
    table: Levels,
    state: tuple[Any, jax.Array, jax.Array],
    keys: jax.Array,
    first: jax.Array | int,
    last: jax.Array | int,
) -> tuple[Any, jax.Array, jax.Array]:
    """Levels `first` to `last` - 1 of `sample`, from (carry, x, x0 of the level before) to those.

    table: `prepared` levels, which may be arguments of the program.
    The bounds are traced: one program runs segments of any length. It cannot be differentiated.
    """
    table = jax.tree.map(jnp.asarray, table)

    def body(i: jax.Array, state: tuple[Any, jax.Array, jax.Array]) -> Any:
        level = jax.tree.map(lambda column: column[i], table)
        carry, x, denoised = solver.step(denoise, *state[:2], level, keys_at(keys, i))
        return carry, x, denoised.x0

    return jax.lax.fori_loop(first, last, body, state)


def prepared(solver: Solver, levels: Levels) -> Levels:
    """The levels with their numbers and the weights of the solver."""
    levels = levels._replace(number=np.arange(len(levels.t), dtype=np.int32))
    if solver.weights is None:
        return levels
    return levels._replace(weights=solver.weights(levels).astype(np.float32))


def keys_at(keys: jax.Array, number: Any) -> jax.Array:
    """Keys [B] of the noise of one level; of noise [B, S, h, w, c] in their place, that itself."""
    if not jax.dtypes.issubdtype(keys.dtype, jax.dtypes.prng_key):
        return jnp.take(keys, number, axis=1)
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)
