"""Overlapping windows over a latent larger than a model was trained on: model -> model.

The split-input mode of the reference (`split_input_params` in `ddpm.py`) with its weights: a pixel
of the result is the weighted mean of the windows that cover it. Here all windows of a step are one
batch. Three deviations, each where the reference fails or leaves pixels without a value: the last
window of a row ends at the border, whatever the stride; a window is never larger than the latent;
windows need not be square.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Pair = tuple[int, int]


def windowed(
    model: Callable,
    *,
    window: Pair = (128, 128),
    stride: Pair = (64, 64),
    clip: tuple[float, float] = (0.01, 0.5),
    tie_clip: tuple[float, float] | None = None,
    at_once: int | None = None,
) -> Callable[[jax.Array, jax.Array, Any], jax.Array]:
    """`model(x, t_b, cond)` on windows of x [B, h, w, c], blended; called like `model`.

    `model` is that of `bundle.bind`; guidance goes around the result. `cond.concat` [B, h, w, c] is
    cut like x; context and label are the same for every window.
    window, stride: (height, width) in pixels of the latent; the defaults, and those of `clip`, are
    those of the reference's super-resolution notebook (`ks`, `stride`, `clip_min_weight`,
    `clip_max_weight`).
    clip: least and greatest weight of a pixel, see `weights`.
    tie_clip: the same for whole windows by their place in the image (`tie_braker`,
    `clip_min_tie_weight`, `clip_max_tie_weight`); None: windows weigh the same.
    at_once: windows of an image in one call of `model`, which bounds memory; None: all of them.
    ValueError for a window or a stride that is not positive, or a stride that leaves gaps.
    """
    _check(window, stride, at_once)

    def split(x: jax.Array, t_b: jax.Array, cond: Any) -> jax.Array:
        shape = x.shape[1:3]
        sides = tuple(min(w, n) for w, n in zip(window, shape))
        places = tuple(positions(n, k, s) for n, k, s in zip(shape, sides, stride))
        tops, lefts = places
        if len(tops) == len(lefts) == 1:  # one window: equal to the bit, not only up to rounding
            return model(x, t_b, cond)

        def cut(a):
            """[B, h, w, c] -> [windows, B, *sides, c], row by row."""
            rows = jnp.stack([a[:, y : y + sides[0]] for y in tops])
            out = jnp.stack([rows[:, :, :, i : i + sides[1]] for i in lefts], axis=1)
            return out.reshape(-1, *out.shape[2:])

        def run(inputs):
            """Some windows [n, B, ...] in one call."""
            count, batch = inputs[0].shape[:2]

            def repeat(a):
                return jnp.broadcast_to(a[None], (count, *a.shape)).reshape(-1, *a.shape[1:])

            flat = [None if a is None else a.reshape(-1, *a.shape[2:]) for a in inputs]
            rest = jax.tree.map(repeat, cond._replace(concat=None))
            out = model(flat[0], repeat(t_b), rest._replace(concat=flat[1]))
            return out.reshape(count, batch, *out.shape[1:])

        concat = None if cond.concat is None else cut(cond.concat)
        out = _in_groups(run, (cut(x), concat), at_once)
        return _blend(out.astype(x.dtype), shape, places, weights(*sides, clip), tie_clip)

    return split


def positions(size: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along one side; the last window ends where the side does."""
    count = -(-(size - window) // stride) + 1
    return [min(i * stride, size - window) for i in range(count)]


def weights(height: int, width: int, clip: tuple[float, float]) -> np.ndarray:
    """[height, width] float64: distance to the nearest border over the side, from 0 at the border
    to 0.5 in the middle, clipped (`delta_border` and `get_weighting`)."""
    y, x = (np.arange(n) / (n - 1) if n > 1 else np.full(1, 0.5) for n in (height, width))
    y, x = np.minimum(y, 1 - y), np.minimum(x, 1 - x)
    return np.clip(np.minimum(y[:, None], x[None]), *clip)


def _in_groups(run: Callable, inputs: tuple, at_once: int | None) -> jax.Array:
    """`run` on [n, ...] arrays, at most `at_once` of the n at a time, one after the other."""
    n = len(inputs[0])
    if at_once is None or n <= at_once:
        return run(inputs)
    groups = -(-n // at_once)
    size = -(-n // groups)  # equal groups, so that little is computed twice
    order = np.minimum(np.arange(groups * size), n - 1).reshape(groups, size)
    out = jax.lax.map(run, jax.tree.map(lambda a: a[order], inputs))
    return out.reshape(-1, *out.shape[2:])[:n]


def _blend(out, shape: Pair, places, weight, tie_clip) -> jax.Array:
    """[windows, B, k, l, c] -> [B, h, w, c]: sums of weight * window over sums of weight."""
    counts = tuple(map(len, places))
    tie = np.ones(counts) if tie_clip is None else weights(*counts, tie_clip)
    each = (tie[:, :, None, None] * weight).astype(np.float32)  # [rows, columns, k, l]
    out = out.reshape(*counts, *out.shape[1:]) * each[:, :, None, :, :, None]
    total = _fold(each[:, :, None, :, :, None].astype(np.float64), shape, places, np)
    return _fold(out, shape, places, jnp) / total.astype(np.float32)


def _fold(parts, shape: Pair, places, xp):
    """Sum of windows [rows, columns, B, k, l, c] at their places: [B, h, w, c]."""
    (height, width), (tops, lefts) = shape, places
    rows, _, batch, k, _, channels = parts.shape
    wide = xp.zeros((rows, batch, k, width, channels), parts.dtype)
    for j, left in enumerate(lefts):
        wide = _add(wide, (..., slice(left, left + parts.shape[4]), slice(None)), parts[:, j])
    whole = xp.zeros((batch, height, width, channels), parts.dtype)
    for i, top in enumerate(tops):
        whole = _add(whole, (slice(None), slice(top, top + k)), wide[i])
    return whole


def _add(target, index, values):
    if isinstance(target, np.ndarray):
        target[index] += values
        return target
    return target.at[index].add(values)


def _check(window: Pair, stride: Pair, at_once: int | None) -> None:
    if min(*window, *stride) < 1 or any(s > w for s, w in zip(stride, window)):
        raise ValueError(
            f"window {window} and stride {stride}: both are positive (height, width), and a stride"
            " larger than the window leaves gaps"
        )
    if at_once is not None and at_once < 1:
        raise ValueError(f"at_once={at_once}: at least one window is computed at a time")


def count(height: int, width: int, window: Pair, stride: Pair) -> int:
    """Windows over a latent of this size."""
    sides = zip((height, width), window, stride)
    return math.prod(len(positions(n, min(k, n), s)) for n, k, s in sides)
