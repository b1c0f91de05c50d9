"""Classifier-free guidance: order of the doubled batch, scales, standard deviations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.guidance import classifier_free, rescaled

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 4, 4, 3)), jnp.float32)
T = jnp.array([7, 9])
COND = {"context": jnp.array([[1.0], [2.0]]), "label": jnp.array([3, 4]), "concat": None}
NULL = {"context": jnp.array([[0.5], [0.5]]), "label": jnp.array([9, 9]), "concat": None}


def model(x, t_b, cond):
    """Something in which every input matters."""
    row = jnp.sin(t_b) + cond["context"][:, 0] + 0.1 * cond["label"]
    return jnp.tanh(x) * row[:, None, None, None] + x**2


def test_one_call_with_the_null_before_the_cond_of_each_row():
    calls = []

    def spy(x, t_b, cond):
        calls.append((x, t_b, cond))
        return model(x, t_b, cond)

    classifier_free(spy, COND, NULL, 3.0)(X, T)
    ((x, t_b, cond),) = calls
    np.testing.assert_array_equal(x, np.stack([X[0], X[0], X[1], X[1]]))
    np.testing.assert_array_equal(t_b, [7, 7, 9, 9])
    np.testing.assert_array_equal(cond["label"], [9, 3, 9, 4])
    assert cond["concat"] is None


def test_a_model_that_repeats_rows_itself_gets_them_once():
    calls = []

    def spy(x, t_b, cond):
        calls.append((x, t_b))
        return model(jnp.repeat(x, 2, axis=0), jnp.repeat(t_b, 2), cond)

    out = classifier_free(spy, COND, NULL, 3.0, shared=True)(X, T)
    np.testing.assert_array_equal(out, classifier_free(model, COND, NULL, 3.0)(X, T))
    np.testing.assert_array_equal(calls[0][0], X)
    np.testing.assert_array_equal(calls[0][1], T)


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5, np.array([0.0, 3.0], np.float32)], ids=str)
def test_scale_extrapolates_from_null_to_cond(scale):
    null, cond = model(X, T, NULL), model(X, T, COND)
    rows = np.broadcast_to(np.asarray(scale, np.float32), 2)[:, None, None, None]
    out = classifier_free(model, COND, NULL, scale)(X, T)
    np.testing.assert_allclose(out, null + rows * (cond - null), rtol=1e-5, atol=1e-5)


def test_cond_of_another_batch_size_is_an_error():
    cond = jax.tree.map(lambda a: a[:1], COND)
    with pytest.raises((TypeError, ValueError)):
        classifier_free(model, cond, NULL, 3.0)(X, T)


def test_full_rescale_has_the_standard_deviation_of_the_conditional():
    cond = model(X, T, COND)
    out = classifier_free(model, COND, NULL, 7.5, rescale=1.0)(X, T)
    np.testing.assert_allclose(jnp.std(out, (1, 2, 3)), jnp.std(cond, (1, 2, 3)), rtol=1e-5)
    plain = classifier_free(model, COND, NULL, 7.5)(X, T)
    ratio = out / plain  # one factor per row: the mean moves with it
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1, :1], X.shape), rtol=1e-4)


def test_rescale_mixes_by_phi_per_row():
    plain = classifier_free(model, COND, NULL, 7.5)(X, T)
    full = classifier_free(model, COND, NULL, 7.5, rescale=1.0)(X, T)
    out = classifier_free(model, COND, NULL, 7.5, rescale=jnp.array([0.0, 0.7]))(X, T)
    np.testing.assert_allclose(out[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(out[1], 0.7 * full[1] + 0.3 * plain[1], rtol=1e-5, atol=1e-5)


def test_rescale_of_a_network_that_returns_zeros_is_finite():
    zeros = jnp.zeros_like(X)
    np.testing.assert_array_equal(rescaled(zeros, zeros, 0.7), zeros)


def test_no_rescale_is_not_in_the_program():
    def program(phi):
        return str(jax.make_jaxpr(lambda x: classifier_free(model, COND, NULL, 3.0, phi)(x, T))(X))

    assert "sqrt" in program(0.7)
    assert "sqrt" not in program(0.0)


def test_guidance_within_an_interval_of_timesteps():
    calls = []

    def spy(x, t_b, cond):
        calls.append(x.shape[0])
        return model(x, t_b, cond)

    @jax.jit
    def within(t, interval):
        return classifier_free(spy, COND, NULL, 3.0, interval=interval)(X, jnp.full(2, t))

    everywhere = classifier_free(model, COND, NULL, 3.0)
    for t, inside in ((4, False), (5, True), (7, True), (9, True), (10, False)):
        t_b = jnp.full(2, t)
        expected = everywhere(X, t_b) if inside else model(X, t_b, COND)
        np.testing.assert_allclose(within(t, (5, 9)), expected, rtol=1e-5, atol=1e-6)
    assert np.allclose(within(4, (4, 4)), everywhere(X, jnp.full(2, 4)), atol=1e-5)
    assert sorted(calls) == [2, 4]  # traced once, and outside without the null half
