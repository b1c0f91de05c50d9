"""Attention blocks of the UNet: what they start as, and what they attend to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import draw, filled

from ldm_jax.models import transformer

KEY = jax.random.key(0)


def fill(module, *args):
    return filled(jax.eval_shape(module.init, KEY, *args))


def test_blocks_start_as_identity_and_then_move():
    x, context = draw(2, 4, 6, 32), draw(2, 5, 24)
    for block, args in (
        (transformer.AttentionBlock(4), (x,)),
        (transformer.SpatialTransformer(4, depth=2), (x, context)),
        (transformer.SpatialTransformer(4, linear_projection=True), (x, context)),
    ):
        start, _ = jax.jit(functools.partial(block.init_with_output, KEY))(*args)
        np.testing.assert_array_equal(start, x)
        moved = jax.jit(block.apply)(fill(block, *args), *args)
        assert float(np.abs(moved - x).max()) > 0.05


def test_heads_are_consecutive_channels():
    # with q = k = v = x and a unit output, each head is attention over its own slice
    block, x = transformer.Attention(2), draw(1, 6, 8)
    unit = {"kernel": np.eye(8, dtype=np.float32)}
    bias = {"bias": np.zeros(8, np.float32)}
    params = {f"to_{part}": unit for part in "qkv"} | {"to_out_0": unit | bias}
    got = block.apply({"params": params}, x)
    for half in (slice(0, 4), slice(4, 8)):
        part = x[0, :, half].astype(np.float64)
        weights = np.exp(part @ part.T / 2)
        want = weights @ part / weights.sum(1, keepdims=True)
        np.testing.assert_allclose(got[0, :, half], want, atol=1e-5)


def test_without_context_the_image_attends_to_itself():
    block, x = transformer.Attention(2), draw(2, 6, 8)
    params = fill(block, x)
    np.testing.assert_array_equal(block.apply(params, x), block.apply(params, x, x))


def test_upcast_attends_in_float32():
    seen = []

    def record(q_bqnd, k_blnd, v_blnd, precision=None):
        seen.append({a.dtype for a in (q_bqnd, k_blnd, v_blnd)})
        return v_blnd

    x = jnp.asarray(draw(1, 6, 8), jnp.bfloat16)
    for upcast in (False, True):
        block = transformer.Attention(2, upcast, dtype=jnp.bfloat16, attention=record)
        out = block.apply(fill(block, x), x)
        assert out.dtype == jnp.bfloat16
    assert seen[-1] == {np.dtype("float32")}
    assert seen[0] == {np.dtype("bfloat16")}


def test_only_cross_attention_reads_the_context_twice():
    x, context = draw(1, 6, 32), draw(1, 5, 24)
    block = transformer.TransformerBlock(2, only_cross_attention=True)
    params = fill(block, x, context)
    assert params["params"]["attn1"]["to_k"]["kernel"].shape == (24, 32)
    # without another position to attend to, positions do not see each other
    other = np.concatenate([x[:, :1], 2 * x[:, 1:]], axis=1)
    apply = jax.jit(block.apply)
    want, got = apply(params, x, context), apply(params, other, context)
    np.testing.assert_allclose(got[:, 0], want[:, 0], atol=1e-5)
    assert float(np.abs(got[:, 1:] - want[:, 1:]).max()) > 0.1


def test_context_is_a_set_of_tokens():
    block, x, context = transformer.Attention(2), draw(2, 6, 8), draw(2, 5, 24, seed=2)
    params = fill(block, x, context)
    want = block.apply(params, x, context)
    np.testing.assert_allclose(block.apply(params, x, context[:, ::-1]), want, atol=1e-5)
    twice = np.concatenate([context, context], axis=1)
    np.testing.assert_allclose(block.apply(params, x, twice), want, atol=1e-5)
    other = block.apply(params, x, 2 * context)
    assert float(np.abs(other - want).max()) > 0.05


def test_geglu_gates_with_the_second_half_exactly():
    block, x = transformer.GEGLU(2), np.array([[1.0, 2.0, 3.0, -1.5]], np.float32)
    proj = {"kernel": np.eye(4, dtype=np.float32), "bias": np.zeros(4, np.float32)}
    got = block.apply({"params": {"proj": proj}}, x)
    # x * Phi(x) at 3 and -1.5; the tanh approximation is off by more than 1e-4
    np.testing.assert_allclose(got, [[2.9959503, 2 * -0.1002108]], atol=1e-6)


def test_halves_in_bfloat16_are_two_products_of_the_same_parameters():
    x = draw(2, 5, 8)
    whole, halves = transformer.TwoHalves(16), transformer.TwoHalves(16, jnp.bfloat16)
    variables = fill(whole, x)
    products = str(jax.make_jaxpr(halves.apply)(variables, x)).count("dot_general[")
    assert products == 2
    assert str(jax.make_jaxpr(whole.apply)(variables, x)).count("dot_general[") == 1
    pairs = zip(halves.apply(variables, x), whole.apply(variables, x), strict=True)
    for low, exact in pairs:
        assert low.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(low), exact, atol=3e-2)


@pytest.mark.parametrize(("name", "epsilon"), [("group_norm", 1e-5), ("norm", 1e-6)])
def test_epsilons_are_those_of_the_reference(name, epsilon):
    spatial = name == "norm"
    block = transformer.SpatialTransformer(1) if spatial else transformer.AttentionBlock(1)
    x = 1e-3 * draw(1, 8, 8, 32)
    _, seen = jax.jit(functools.partial(block.init_with_output, KEY, capture_intermediates=True))(x)
    got = seen["intermediates"][name]["__call__"][0]
    wide = x.astype(np.float64)
    mean, var = wide.mean((1, 2), keepdims=True), wide.var((1, 2), keepdims=True)
    np.testing.assert_allclose(got, (wide - mean) / np.sqrt(var + epsilon), atol=1e-4)


def test_the_function_given_is_the_one_used():
    def nothing(q_bqnd, k_bknd, v_bknd, precision=None):
        return jnp.zeros_like(q_bqnd)

    x = draw(1, 4, 4, 32)
    for block in (
        transformer.AttentionBlock(2, attention=nothing),
        transformer.SpatialTransformer(2, attention=nothing),
    ):
        jaxpr = str(jax.make_jaxpr(block.apply)(fill(block, x), x))
        assert "exp" not in jaxpr.replace("expand", "")  # no softmax anywhere
