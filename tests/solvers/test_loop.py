"""The scan: keys, start, traces, recompilation, gradients."""

import functools

import gaussian
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import diffusion, solvers
from ldm_jax.diffusion import Denoised

SD = diffusion.make_schedule("scaled_linear")
LEVELS = solvers.levels(SD, 10)
STEPS = len(LEVELS.t)
KEYS = jax.random.split(jax.random.key(0), 7)
X = jnp.asarray(np.random.default_rng(0).normal(size=(7, 2, 2, 4)), jnp.float32)


@functools.partial(jax.jit, static_argnames=("fixed_start", "traced"))
def run(x, keys, eta=1.0, start=0, fixed_start=None, traced=False):
    return solvers.sample(
        solvers.SOLVERS["ddim"](eta=eta),
        gaussian.denoise,
        LEVELS,
        x,
        keys,
        start=start if fixed_start is None else fixed_start,
        trace=(lambda x, denoised: (x, denoised)) if traced else None,
    )


def test_carry_and_levels_go_through_in_order():
    def step(denoise, carry, x, level, keys):
        del denoise, keys
        return (carry[0] + 1, carry[1].at[carry[0]].set(level.t)), x, Denoised(x, x)

    counter = solvers.Solver(lambda x: (jnp.int32(0), jnp.zeros(STEPS, jnp.int32)), step)

    def remember(denoise, carry, x, level, keys):
        carry, x, _ = step(denoise, carry, x, level, keys)
        return carry, x, Denoised(carry[1], carry[0])

    watched = counter._replace(step=remember)
    trace = lambda x, denoised: denoised  # noqa: E731
    _, (t, count) = solvers.sample(watched, None, LEVELS, X, KEYS, trace=trace)
    np.testing.assert_array_equal(count, np.arange(1, STEPS + 1))
    np.testing.assert_array_equal(t[-1], LEVELS.t)


def test_an_image_ignores_its_batch():
    together = run(X, KEYS)
    for row in (0, 3, 6):
        alone = run(X[row : row + 1], KEYS[row : row + 1])
        np.testing.assert_allclose(alone[0], together[row], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(run(X[::-1], KEYS[::-1])[::-1], together, rtol=1e-6, atol=1e-6)


def test_noise_differs_between_keys_and_between_levels():
    same_x = jnp.broadcast_to(X[:1], X.shape)
    out = run(same_x, KEYS)
    assert not np.allclose(out[0], out[1], atol=0.1)

    def step(denoise, carry, x, level, keys):
        del denoise, level
        return carry, x, Denoised(x, diffusion.rowwise_normal(keys, (1,)))

    trace = lambda x, denoised: denoised.eps  # noqa: E731
    _, noise = solvers.sample(
        solvers.Solver(lambda x: (), step), None, LEVELS, X, KEYS, trace=trace
    )
    assert len(np.unique(noise)) == STEPS * 7


def test_start_continues_a_trajectory():
    start = 4
    end, (xs, _) = run(X, KEYS, traced=True)
    at_start = xs[start]
    # Same keys at the same levels, so the rest of the noisy trajectory is the same.
    np.testing.assert_allclose(run(at_start, KEYS, fixed_start=start), end, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(at_start, KEYS, start=start), end, rtol=1e-5, atol=1e-6)


def test_start_skips_levels():
    assert np.array_equal(run(X, KEYS, start=STEPS), X)
    _, (xs, denoised) = run(X, KEYS, start=3, traced=True)
    assert xs.shape == (STEPS, *X.shape)
    np.testing.assert_array_equal(xs[:4], jnp.broadcast_to(X, (4, *X.shape)))
    np.testing.assert_array_equal(denoised.x0[:3], xs[:3])
    assert not np.allclose(xs[4], X, atol=0.01)
    _, (xs, _) = run(X, KEYS, fixed_start=3, traced=True)
    assert xs.shape == (STEPS - 3, *X.shape)
    for bad in (-1, STEPS + 1):
        with pytest.raises(ValueError, match=f"start={bad} is not in 0..{STEPS}"):
            run(X, KEYS, fixed_start=bad)


def test_trace_holds_what_the_denoiser_said():
    x_0, (xs, denoised) = run(X, KEYS, eta=0.0, traced=True)
    np.testing.assert_array_equal(xs[0], X)
    level = jax.tree.map(lambda column: column[5], LEVELS)
    np.testing.assert_allclose(denoised.x0[5], gaussian.denoise(xs[5], level).x0, atol=1e-6)
    last = LEVELS.alpha_next[-1] * denoised.x0[-1] + LEVELS.sigma_next[-1] * denoised.eps[-1]
    np.testing.assert_allclose(x_0, last, atol=1e-6)


@pytest.mark.parametrize("start", [None, 2], ids=["whole", "traced start"])
def test_gradient_through_the_scan_equals_the_difference_quotient(start):
    levels = solvers.levels(SD, 20, "trailing")

    def model(x, t_b):
        return 0.8 * jnp.tanh(x) + 0.3 * jnp.sin(t_b / 70)[:, None, None, None]

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(x, eta, start):
        denoise = jax.checkpoint(diffusion.denoiser(model, "eps"))
        solver = solvers.SOLVERS["ddim"](eta=eta)
        return jnp.mean(solvers.sample(solver, denoise, levels, x, KEYS, start=start) ** 2)

    begin = 0 if start is None else start
    along = jnp.asarray(np.random.default_rng(1).normal(size=X.shape), jnp.float32)
    _, (by_x, by_eta) = loss(X, 0.5, begin)
    up, down = loss(X + 0.01 * along, 0.5, begin)[0], loss(X - 0.01 * along, 0.5, begin)[0]
    np.testing.assert_allclose(jnp.sum(by_x * along), (up - down) / 0.02, rtol=5e-3)
    up, down = loss(X, 0.51, begin)[0], loss(X, 0.49, begin)[0]
    np.testing.assert_allclose(by_eta, (up - down) / 0.02, rtol=5e-3)
    _, (_, by_eta) = loss(X, 0.0, begin)
    assert np.isfinite(by_eta)
