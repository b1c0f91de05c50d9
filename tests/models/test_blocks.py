"""Layers and residual blocks: initialization, paddings, norms, time embedding."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from reference import draw, filled

from ldm_jax.models import blocks

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("layer", "x", "fan_in"),
    [
        (blocks.conv(32, 256), draw(1, 2, 2, 32), 32 * 9),
        (blocks.conv(128, 256, 1), draw(1, 2, 2, 128), 128),
        (blocks.dense(128, 256), draw(1, 128), 128),
    ],
)
def test_weights_and_biases_start_uniform_within_the_fan_in(layer, x, fan_in):
    params = layer.init(KEY, x)["params"]
    bound = 1 / math.sqrt(fan_in)
    for name in ("kernel", "bias"):
        value = np.asarray(params[name])
        assert bound * 0.98 < np.abs(value).max() <= bound
        assert value.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert value.mean() == pytest.approx(0, abs=0.1 * bound)


def test_zero_layers_start_at_zero():
    for layer, x in (
        (blocks.conv(8, 8, zero=True), draw(1, 4, 4, 8)),
        (blocks.dense(8, 8, zero=True), draw(1, 8)),
    ):
        assert not np.asarray(layer.init_with_output(KEY, x)[0]).any()


@pytest.mark.torch
@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("padding", [(1, 1), (0, 1)])
def test_downsample_pads_as_the_reference(padding, size):
    torch = pytest.importorskip("torch", reason="torch is the reference")
    layer = blocks.Downsample(padding, precision="highest")
    x = draw(2, size, size, 32)
    params = filled(layer.init(KEY, x))
    kernel, bias = (np.array(params["params"]["conv"][name]) for name in ("kernel", "bias"))
    padded = torch.nn.functional.pad(torch.tensor(np.array(x)).permute(0, 3, 1, 2), 2 * padding)
    weight = torch.tensor(kernel).permute(3, 2, 0, 1)
    want = torch.nn.functional.conv2d(padded, weight, torch.tensor(bias), stride=2)
    got = layer.apply(params, x)
    np.testing.assert_allclose(got, want.permute(0, 2, 3, 1).numpy(), atol=1e-5)


def test_nearest_repeats_pixels():
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    want = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    np.testing.assert_array_equal(blocks.nearest(x)[0, :, :, 0], want)


def test_timestep_embedding_is_cosines_then_sines():
    t = np.array([0, 1, 500, 999])
    frequencies = np.exp(-math.log(10000) * np.arange(16) / 16)
    angles = t[:, None] * frequencies[None]
    want = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    got = blocks.timestep_embedding(jnp.asarray(t), 32)
    assert got.dtype == jnp.float32
    # float32 angles of up to 999 are known to 6e-5
    np.testing.assert_allclose(got, want, atol=1e-4)
    between = blocks.timestep_embedding(jnp.asarray([0.5]), 32)
    np.testing.assert_allclose(between[0, :16], np.cos(0.5 * frequencies), atol=1e-6)


def test_group_norm_refuses_widths_that_32_does_not_divide():
    with pytest.raises(ValueError, match="48 channels"):
        blocks.group_norm(48, 1e-5, name="norm", dtype=jnp.float32)


def test_group_norm_equals_that_of_flax_in_value_and_gradient():
    x = 2 + draw(3, 5, 7, 64)
    ours = blocks.group_norm(64, 1e-6, name="norm", dtype=jnp.float32)
    theirs = nn.GroupNorm(32, epsilon=1e-6, use_fast_variance=False)
    params = {"scale": 1 + 0.1 * draw(64, seed=1), "bias": 0.1 * draw(64, seed=2)}

    def loss(layer):
        return lambda params, x: jnp.sum(jnp.sin(layer.apply({"params": params}, x)))

    got, want = (jax.value_and_grad(loss(layer), (0, 1))(params, x) for layer in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5), got, want)


def test_group_norm_computes_in_float32_whatever_the_dtype():
    # a mean of 300 costs bfloat16 all digits of a deviation of 1, and float32 statistics none
    x = jnp.asarray(300 + 4 * draw(1, 16, 16, 64), jnp.bfloat16)
    low = blocks.group_norm(64, 1e-6, name="norm", dtype=jnp.bfloat16)
    full = blocks.group_norm(64, 1e-6, name="norm", dtype=jnp.float32)
    params = low.init(KEY, x)
    got, want = low.apply(params, x), full.apply(params, x.astype(jnp.float32))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2e-2)
    assert params["params"]["scale"].dtype == jnp.float32


def test_group_norm_keeps_the_digits_of_a_large_mean():
    # E[x^2] - E[x]^2 would lose the variance of 1 beside a square of 1e7
    x = 3000 + draw(1, 16, 16, 32)
    layer = blocks.group_norm(32, 1e-6, name="norm", dtype=jnp.float32)
    wide = x.astype(np.float64)
    want = (wide - wide.mean((1, 2), keepdims=True)) / wide.std((1, 2), keepdims=True)
    np.testing.assert_allclose(layer.init_with_output(KEY, x)[0], want, atol=2e-3)


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_one_pass_over_bfloat16_errs_less_than_its_rounding(mean):
    x = (mean + draw(2, 16, 16, 64)).astype(jnp.bfloat16)
    layer = blocks.GroupNorm(1e-5)
    got = layer.apply(filled(jax.eval_shape(layer.init, KEY, x)), x)
    want = layer.apply(filled(jax.eval_shape(layer.init, KEY, x)), x.astype(jnp.float32))
    assert np.any(got != want)  # the two passes of float32
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_epsilons_are_those_of_the_reference():
    x, emb = 1e-3 * draw(1, 8, 8, 32), draw(1, 64, seed=2)

    def first_norm(block, *args):
        _, seen = block.init_with_output(KEY, *args, capture_intermediates=True)
        return seen["intermediates"]["norm1"]["__call__"][0]

    groups = np.asarray(x, np.float64)  # 32 channels, 32 groups: one channel each
    mean, var = groups.mean((1, 2), keepdims=True), groups.var((1, 2), keepdims=True)
    for block, args, epsilon in (
        (blocks.ResBlock(32), (x, emb), 1e-5),
        (blocks.AutoencoderResBlock(32), (x,), 1e-6),
    ):
        want = (groups - mean) / np.sqrt(var + epsilon)
        np.testing.assert_allclose(first_norm(block, *args), want, atol=1e-4)


@pytest.mark.parametrize("scale_shift_norm", [False, True])
def test_res_block_starts_as_its_skip_connection(scale_shift_norm):
    x, emb = draw(2, 4, 4, 32), draw(2, 64, seed=2)
    block = blocks.ResBlock(32, scale_shift_norm=scale_shift_norm)
    out, params = block.init_with_output(KEY, x, emb)
    np.testing.assert_array_equal(out, x)
    width = 64 if scale_shift_norm else 32
    assert params["params"]["time_emb_proj"]["kernel"].shape == (64, width)
    moved = block.apply(filled(params), x, emb)
    assert float(jnp.abs(moved - x).max()) > 0.01


def test_res_block_resamples_the_skip_connection():
    x, emb = draw(1, 4, 6, 32), draw(1, 64, seed=2)
    up, _ = blocks.ResBlock(32, resample="up").init_with_output(KEY, x, emb)
    np.testing.assert_array_equal(up, blocks.nearest(x))
    down, _ = blocks.ResBlock(32, resample="down").init_with_output(KEY, x, emb)
    np.testing.assert_allclose(down, x.reshape(1, 2, 2, 3, 2, 32).mean((2, 4)), atol=1e-6)


@pytest.mark.parametrize("kind", [blocks.ResBlock, blocks.AutoencoderResBlock])
def test_dropout_acts_in_training_only(kind):
    block = kind(32, dropout=0.5)
    args = (draw(2, 4, 4, 32), draw(2, 64, seed=2))[: 2 if kind is blocks.ResBlock else 1]
    params = filled(jax.eval_shape(block.init, KEY, *args))

    def run(train, key):
        return block.apply(params, *args, train, rngs={"dropout": jax.random.key(key)})

    np.testing.assert_array_equal(run(False, 0), run(False, 1))
    assert float(jnp.abs(run(True, 0) - run(True, 1)).max()) > 0.01
