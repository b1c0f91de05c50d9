"""Overlapping windows: weights and blending of the reference, on any size, in one call or more."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import guidance
from ldm_jax.conditioning import Cond
from ldm_jax.large import windows

T = jnp.array([3, 5])


def model(x, t_b, cond):
    """Something in which every input matters and that depends on where a window's border is."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    around = padded[:, 2:, 1:-1] + 0.5 * padded[:, 1:-1, :-2]
    row = jnp.sin(t_b) + cond.label + jnp.mean(cond.context, axis=(1, 2))
    concat = 0 if cond.concat is None else cond.concat[..., :1] ** 2
    return jnp.tanh(around) * row[:, None, None, None] + concat


def inputs(height, width, concat=True):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, height, width, 3)).astype(np.float32)
    extra = rng.standard_normal((2, height, width, 2)).astype(np.float32)
    context = rng.standard_normal((2, 4, 5)).astype(np.float32)
    cond = Cond(jnp.asarray(context), jnp.asarray(extra) if concat else None, jnp.array([0.5, 2]))
    return jnp.asarray(x), cond


def distance(y, x, height, width):
    """To the nearest border, over the side, in the words of the reference."""
    sides = (y / (height - 1), x / (width - 1), 1 - y / (height - 1), 1 - x / (width - 1))
    return min(sides)


def one_by_one(x, cond, tops, lefts, k, l, clip, tie_clip):  # noqa: E741
    """The reference's loop: fold(output * weighting) / fold(weighting)."""
    total, norm = np.zeros(x.shape), np.zeros(x.shape[1:3])
    for i, top in enumerate(tops):
        for j, left in enumerate(lefts):
            at = (slice(None), slice(top, top + k), slice(left, left + l))
            concat = None if cond.concat is None else cond.concat[at]
            out = np.asarray(model(x[at], T, cond._replace(concat=concat)), np.float64)
            tie = 1.0
            if tie_clip is not None:
                tie = np.clip(distance(i, j, len(tops), len(lefts)), *tie_clip)
            for y in range(k):
                for z in range(l):
                    weight = tie * np.clip(distance(y, z, k, l), *clip)
                    total[:, top + y, left + z] += weight * out[:, y, z]
                    norm[top + y, left + z] += weight
    return total / norm[None, :, :, None]


@pytest.mark.parametrize("tie_clip", [None, (0.05, 0.4)])
@pytest.mark.parametrize("at_once", [None, 1, 5])
def test_equals_the_reference_loop(tie_clip, at_once):
    x, cond = inputs(12, 16)
    split = windows.windowed(
        model, window=(6, 8), stride=(3, 4), clip=(0.1, 0.3), tie_clip=tie_clip, at_once=at_once
    )
    expected = one_by_one(x, cond, (0, 3, 6), (0, 4, 8), 6, 8, (0.1, 0.3), tie_clip)
    np.testing.assert_allclose(jax.jit(split)(x, T, cond), expected, atol=2e-6)
    assert np.abs(expected - model(x, T, cond)).max() > 0.1  # borders of windows are seen


def test_the_last_window_ends_at_the_border():
    x, cond = inputs(10, 13, concat=False)
    split = windows.windowed(model, window=(6, 8), stride=(3, 4), clip=(0.1, 0.3))
    assert windows.positions(10, 6, 3) == [0, 3, 4]
    assert windows.positions(13, 8, 4) == [0, 4, 5]
    assert windows.count(10, 13, (6, 8), (3, 4)) == 9
    expected = one_by_one(x, cond, (0, 3, 4), (0, 4, 5), 6, 8, (0.1, 0.3), None)
    np.testing.assert_allclose(jax.jit(split)(x, T, cond), expected, atol=2e-6)


def test_weights_of_the_reference():
    found = windows.weights(5, 3, (0.01, 0.3))
    row = [0.01, 0.25, 0.01]
    np.testing.assert_allclose(found, [[0.01] * 3, row, [0.01, 0.3, 0.01], row, [0.01] * 3])
    np.testing.assert_allclose(windows.weights(1, 3, (0.01, 0.5)), [[0.01, 0.5, 0.01]])


def test_a_latent_within_one_window_is_the_plain_model():
    x, cond = inputs(6, 7)
    split = windows.windowed(model, tie_clip=(0.05, 0.4))
    np.testing.assert_allclose(split(x, T, cond), model(x, T, cond), atol=1e-6)


def test_windows_are_one_batch_and_go_under_guidance():
    x, cond = inputs(8, 8)
    null = jax.tree.map(jnp.zeros_like, cond)
    shapes = []

    def spy(x, t_b, cond):
        shapes.append((x.shape, t_b.shape, cond.context.shape, cond.concat.shape))
        return model(x, t_b, cond)

    split = functools.partial(windows.windowed, window=(4, 4), stride=(2, 4))
    found = guidance.classifier_free(split(spy), cond, null, 3.0)(x, T)
    assert shapes == [((24, 4, 4, 3), (24,), (24, 4, 5), (24, 4, 4, 2))]  # 6 windows, 2 rows, twice
    plain = split(model)(x, T, cond)
    without = split(model)(x, T, null)
    np.testing.assert_allclose(found, without + 3 * (plain - without), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": (8, 8), "stride": (4, 9)}, r"window \(8, 8\) and stride \(4, 9\): .*gaps"),
        ({"window": (0, 8)}, r"window \(0, 8\)"),
        ({"at_once": 0}, "at_once=0"),
    ],
)
def test_impossible_windows_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        windows.windowed(model, **arguments)
