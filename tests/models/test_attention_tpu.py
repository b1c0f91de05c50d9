"""The TPU's attention kernels in interpret mode against plain attention, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from ldm_jax.cost import flops
from ldm_jax.models import attention, attention_tpu

HEADS, WIDTH = 2, 40


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of queries and of keys already for some hundreds of them."""
    monkeypatch.setattr(attention_tpu, "BLOCK", 128)
    monkeypatch.setattr(attention_tpu, "CHUNK", 128)
    monkeypatch.setattr(attention_tpu, "KEY_BYTES", 1)


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels run on any platform."""
    run = functools.partial(attention_tpu.flash, interpret=True)
    monkeypatch.setattr(attention_tpu, "flash", run)


def qkv(queries, keys, scale=1.0, width=WIDTH):
    rng = np.random.default_rng(0)
    q = scale * rng.standard_normal((2, queries, HEADS, width))
    k, v = rng.standard_normal((2, 2, keys, HEADS, width))
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v))


def flash(q_bqnd, k_bknd, v_bknd):
    merged = (a.reshape(*a.shape[:2], -1) for a in (q_bqnd, k_bknd, v_bknd))
    out_bqc = attention_tpu.flash(*merged, HEADS, "highest", interpret=True)
    return out_bqc.reshape(q_bqnd.shape)


def plain(q_bqnd, k_bknd, v_bknd):
    return attention.xla(q_bqnd, k_bknd, v_bknd, "highest")


@pytest.mark.parametrize(("queries", "keys"), [(256, 256), (200, 300), (128, 77)])
def test_equals_plain_attention_forward_and_backward(queries, keys, small_blocks):
    args = qkv(queries, keys)
    upstream = qkv(queries, keys, scale=-2.0)[0]
    got, pull = jax.vjp(jax.jit(flash), *args)
    want, pull_plain = jax.vjp(jax.jit(plain), *args)
    np.testing.assert_allclose(got, want, atol=1e-6)
    for gradient, expected in zip(pull(upstream), pull_plain(upstream), strict=True):
        np.testing.assert_allclose(gradient, expected, atol=5e-6)


def test_large_logits_do_not_overflow(small_blocks):
    args = qkv(128, 256, scale=1000.0)
    np.testing.assert_allclose(flash(*args), plain(*args), atol=2e-3)


def test_bfloat16_has_float32_softmax(small_blocks):
    # logits 64 and 64.25 (before the scale) are the same number in bfloat16
    q = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
    k = jnp.zeros((1, 2, 1, 8), jnp.bfloat16).at[..., 0].set(64).at[:, 1, :, 1].set(0.25)
    v = jnp.array([-1, 1], jnp.bfloat16)[None, :, None, None] * q
    merged = (a.reshape(*a.shape[:2], 8) for a in (q, k, v))
    got = attention_tpu.flash(*merged, 1, interpret=True)
    np.testing.assert_allclose(np.float32(got), np.tanh(0.25 / np.sqrt(8) / 2), atol=2e-3)


def test_products_with_the_values_stream_the_width_of_a_head_as_rows():
    shape = jax.ShapeDtypeStruct((1, 1024, HEADS, WIDTH), jnp.bfloat16)
    ((calls),) = flops.kernels(jax.make_jaxpr(flash)(shape, shape, shape)).values()
    (executed,) = calls.values()
    assert executed == 2 * HEADS * 1024**2 * (128 + WIDTH)  # not 128 + 128


@pytest.mark.parametrize(
    ("queries", "width", "precision", "kernel"),
    [
        (512, 40, None, True),
        (512, 40, "highest", True),
        (512, 40, jax.lax.Precision.HIGH, False),
        (511, 40, None, False),
        (512, 36, None, False),
    ],
)
def test_what_the_kernel_is_not_for_takes_plain_attention(
    queries, width, precision, kernel, monkeypatch
):
    assert attention.FLASH_LOGITS == 512 * 512
    marked = jnp.full((2, queries, HEADS * width), 7.0)
    monkeypatch.setattr(attention_tpu, "flash", lambda *args: marked)
    got = attention.flash(*qkv(queries, 512, width=width), precision)
    assert (got[0, 0, 0, 0] == 7) == kernel


def test_is_split_over_a_mesh(small_blocks, interpreted, monkeypatch):
    monkeypatch.setattr(attention, "FLASH_LOGITS", 1)
    mesh = jax.make_mesh((2, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    args = qkv(64, 64)
    got = jax.jit(attention.choose("tpu", mesh))(*args)
    np.testing.assert_allclose(got, plain(*args), atol=1e-5)
