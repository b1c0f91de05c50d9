"""The gradient through twenty scanned steps, each computed again on the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import task_models
from reference import draw

from ldm_jax import sampling, schema
from ldm_jax.conditioning import Cond

SHAPE, ROWS, STEPS = (4, 4, 4), 2, 20
KEYS = jax.random.split(jax.random.key(0), ROWS)
NULL = Cond(context=draw(ROWS, 3, 32, seed=2))
WEIGHTS = draw(ROWS, *SHAPE, seed=5)


@pytest.fixture(scope="module")
def model():
    return task_models.make(
        schema.ClassCondConfig(num_classes=4, embed_dim=32),
        **{**task_models.CONTEXT, "attention_downsample": ()},  # in the middle block alone
    )


def request():
    """What is differentiated: noise, prompt, scale, eta."""
    return {
        "x_T": draw(ROWS, *SHAPE),
        "context": draw(ROWS, 3, 32, seed=3),
        "scale": np.float32(2.0),
        "eta": np.float32(0.4),
    }


def sampler(model, remat, shape=SHAPE):
    sample = sampling.make_sampler(model, shape=shape, steps=STEPS, decode=False, remat=remat)

    def run(given):
        cond = Cond(context=given["context"])
        return sample(model.params, cond, KEYS, NULL, given["scale"], given["eta"], given["x_T"])

    return run


def test_the_gradient_agrees_with_finite_differences(model, record_property):
    run = jax.jit(sampler(model, remat=True))
    loss = lambda given: jnp.sum(WEIGHTS * sampler(model, remat=True)(given))  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(request())

    def value(given):  # summed in float64: the latent is what rounds
        return np.sum(WEIGHTS.astype(np.float64) * np.asarray(run(given), np.float64))

    def moved(name, direction, by):
        return value({**request(), name: np.float32(request()[name] + by * direction)})

    for i, (name, x) in enumerate(request().items()):
        direction = draw(*x.shape, seed=10 + i) if x.ndim else np.float32(1)
        expected = np.sum(np.float64(direction) * np.asarray(gradient[name], np.float64))
        near, far = (
            (moved(name, direction, h) - moved(name, direction, -h)) / (2 * h) for h in (0.01, 0.02)
        )
        found = (4 * near - far) / 3  # without the error of second order
        record_property(name, f"{expected:.6g} against {found:.6g}")
        assert found == pytest.approx(expected, rel=2e-3), name


@pytest.mark.slow
def test_recomputed_steps_need_less_memory(model, record_property):
    def compiled(remat):
        loss = lambda given: jnp.sum(sampler(model, remat, (16, 16, 4))(given) ** 2)  # noqa: E731
        given = {**request(), "x_T": draw(ROWS, 16, 16, 4)}
        return jax.jit(jax.grad(loss)).lower(given).compile(), given

    (kept, given), (again, _) = compiled(False), compiled(True)
    sizes = [c.memory_analysis().temp_size_in_bytes for c in (kept, again)]
    record_property("bytes", str(sizes))
    assert sizes[1] < 0.25 * sizes[0]
    for a, b in zip(jax.tree.leaves(kept(given)), jax.tree.leaves(again(given)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max())
