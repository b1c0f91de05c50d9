"""Masked sampling: what the model sees, against the reference's order of blend, call and step."""

import operator

import gaussian
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from ldm_jax import diffusion, solvers

SD = diffusion.make_schedule("scaled_linear")
LEVELS = solvers.levels(SD, 5)
SHAPE = (3, 4, 2, 4)
KEYS = jax.random.split(jax.random.key(0), 3)
X0, X_T = reference.draw(*SHAPE, seed=1), reference.draw(*SHAPE, seed=2)
HOLE = np.zeros((3, 4, 2, 1), np.float32)
HOLE[:, 2:] = 1


def test_the_model_sees_the_known_part_at_its_level():
    level = jax.tree.map(operator.itemgetter(2), LEVELS)
    see = solvers.masked(lambda x, level: x, X0, HOLE, lambda level: np.float32(0.5))
    seen = see(X_T, level)
    known = level.alpha * X0 + level.sigma * 0.5
    np.testing.assert_allclose(seen[:, :2], known[:, :2], rtol=1e-6)
    np.testing.assert_array_equal(seen[:, 2:], X_T[:, 2:])


def test_ddim_is_the_references_loop():
    """x = mask x_known + (1 - mask) x, then the model and the step, with the same noise."""
    noises = dict(zip(LEVELS.sigma.tolist(), reference.draw(5, *SHAPE, seed=3), strict=True))
    x = X_T
    for i, (sigma, noise) in enumerate(noises.items()):
        level = jax.tree.map(operator.itemgetter(i), LEVELS)
        x = HOLE * x + (1 - HOLE) * (level.alpha * X0 + sigma * noise)
        e = coupled(x, level).eps
        x = level.alpha_next * (x - sigma * e) / level.alpha + level.sigma_next * e
    table = (jnp.stack([*noises]), jnp.stack([*noises.values()]))
    given = lambda level: table[1][jnp.argmin(jnp.abs(table[0] - level.sigma))]  # noqa: E731
    denoise = solvers.masked(coupled, X0, HOLE, given)
    found = solvers.sample(solvers.make("ddim"), denoise, LEVELS, X_T, KEYS)
    np.testing.assert_allclose(found, x, atol=2e-5)


def coupled(x, level):
    """A model whose hole depends on what surrounds it."""
    mean = jnp.mean(x, axis=(1, 2), keepdims=True)
    eps = gaussian.denoise(x - 0.5 * mean, level).eps
    return diffusion.Denoised(diffusion.x0_from_eps(x, eps, level.alpha, level.sigma), eps)


QUICK = ("ddim", "plms", "heun", "dpmpp_2m")  # one of each kind: the others are slow here


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in solvers.SOLVERS]
)
def test_what_is_outside_the_hole_in_x_never_matters(name):
    @jax.jit
    def draw(x_T):
        noise = solvers.fresh_noise(KEYS, SHAPE[1:])
        denoise = solvers.masked(coupled, X0, HOLE, noise)
        return solvers.sample(solvers.make(name), denoise, LEVELS, x_T, KEYS)

    first, second = draw(X_T), draw(X_T + 3 * (1 - HOLE))
    assert np.isfinite(first).all()
    np.testing.assert_allclose(first[:, 2:], second[:, 2:], atol=1e-5)
    kept = solvers.composite(first, X0, HOLE)
    np.testing.assert_array_equal(kept[:, :2], X0[:, :2])


def test_noise_is_of_the_row_and_the_level():
    one, two = (jax.tree.map(operator.itemgetter(i), LEVELS) for i in (1, 2))
    noise = solvers.fresh_noise(KEYS, SHAPE[1:])
    np.testing.assert_array_equal(noise(one), noise(one._replace(t=7)))
    assert np.abs(noise(one) - noise(two)).max() > 1
    assert np.abs(noise(one)[0] - noise(one)[1]).max() > 1
    alone = solvers.fresh_noise(KEYS[1:2], SHAPE[1:])
    np.testing.assert_array_equal(alone(one)[0], noise(one)[1])
