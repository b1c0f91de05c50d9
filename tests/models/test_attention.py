"""Attention functions agree with the formula and with each other, and the right one is chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ldm_jax.models import attention


def qkv(batch=2, queries=37, keys=11, heads=3, width=8, dtype=jnp.float32, scale=1.0):
    rng = np.random.default_rng(0)
    q = scale * rng.standard_normal((batch, queries, heads, width))
    k, v = rng.standard_normal((2, batch, keys, heads, width))
    return tuple(jnp.asarray(x.astype(np.float32).astype(dtype)) for x in (q, k, v))


def formula(q_bqnd, k_bknd, v_bknd):
    q, k, v = (np.asarray(x, np.float64) for x in (q_bqnd, k_bknd, v_bknd))
    logits = np.einsum("bqnd,bknd->bnqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bnqk,bknd->bqnd", weights, v)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(attention, "CHUNK_LOGITS", 11 * 10)  # ten queries at a time


EVERYWHERE = [attention.xla, attention.chunked, attention.grouped]


@pytest.mark.parametrize("function", EVERYWHERE)
@pytest.mark.parametrize("scale", [1.0, 1000.0])  # logits of some thousands must not overflow
def test_formula(function, scale, small_chunks):
    args = qkv(scale=scale)
    got = jax.jit(functools.partial(function, precision="highest"))(*args)
    np.testing.assert_allclose(got, formula(*args), atol=2e-6 * scale)


@pytest.mark.parametrize("function", [attention.chunked, attention.grouped])
def test_gradients_are_those_of_xla(function, small_chunks):
    compare_gradients(function, qkv())


def compare_gradients(function, args):
    def loss(function, args):
        return jnp.sum(jnp.sin(function(*args, precision="highest")))

    got = jax.jit(jax.grad(functools.partial(loss, function)))(args)
    want = jax.jit(jax.grad(functools.partial(loss, attention.xla)))(args)
    for a, b in zip(got, want, strict=True):
        assert float(jnp.abs(b).max()) > 0.1
        np.testing.assert_allclose(a, b, atol=2e-6)


def scans(function, args):
    """Lengths of the loops in a function."""
    found = jax.make_jaxpr(lambda *args: function(*args))(*args).eqns  # traced anew
    return [e.params["length"] for e in found if e.primitive.name == "scan"]


def test_grouped_takes_as_many_heads_as_fit(monkeypatch):
    args = qkv(batch=1, heads=7)
    assert not scans(attention.grouped, args)
    monkeypatch.setattr(attention, "CHUNK_LOGITS", 4 * 37 * 11 - 1)  # three heads, and one is left
    assert scans(attention.grouped, args) == [2]
    got = jax.jit(functools.partial(attention.grouped, precision="highest"))(*args)
    np.testing.assert_allclose(got, formula(*args), atol=2e-6)
    compare_gradients(attention.grouped, args)


@pytest.mark.parametrize("function", EVERYWHERE)
def test_bfloat16_keeps_its_type_and_stays_close(function, small_chunks):
    got = jax.jit(function)(*qkv(dtype=jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), formula(*qkv()), atol=2e-2)


@pytest.mark.parametrize("function", EVERYWHERE)
def test_logits_are_float32_for_bfloat16_inputs(function):
    # logits 64 and 64.25 (before the scale) are the same number in bfloat16
    q = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
    k = jnp.zeros((1, 2, 1, 8), jnp.bfloat16).at[..., 0].set(64).at[:, 1, :, 1].set(0.25)
    v = jnp.array([-1, 1], jnp.bfloat16)[None, :, None, None] * q
    want = np.tanh(0.25 / np.sqrt(8) / 2)
    np.testing.assert_allclose(np.float32(jax.jit(function)(q, k, v)), want, atol=2e-3)


def test_chunked_needs_less_memory(monkeypatch):
    monkeypatch.setattr(attention, "CHUNK_LOGITS", 64 * 512)
    args = qkv(batch=1, queries=512, keys=512, heads=4)

    def temporaries(function):
        def loss(q, k, v):
            return function(q, k, v).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(attention.chunked) < temporaries(attention.xla) / 4


@pytest.mark.parametrize(
    ("dtype", "width"), [(jnp.float32, 8), (jnp.bfloat16, 160), (jnp.bfloat16, 12)]
)
def test_cudnn_leaves_what_it_cannot_do_to_xla(dtype, width, monkeypatch):
    monkeypatch.setattr(jax.nn, "dot_product_attention", None)  # calling it would fail
    args = qkv(dtype=dtype, width=width)
    np.testing.assert_array_equal(attention.cudnn(*args), attention.xla(*args))


@pytest.mark.parametrize(("queries", "keys"), [(8, 12), (8, 77), (7, 12), (9, 77)])
def test_cudnn_masks_the_padding_of_odd_lengths(queries, keys, monkeypatch):
    real = jax.nn.dot_product_attention
    seen = []

    def stand_in(q, k, v, *, implementation, **lengths):  # the same contract, on any platform
        seen.append((implementation, q.shape[1], k.shape[1], bool(lengths)))
        return real(q, k, v, implementation="xla", **lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    args = qkv(queries=queries, keys=keys, dtype=jnp.bfloat16)
    got = jax.jit(attention.cudnn)(*args)
    assert got.shape == args[0].shape
    odd = bool(queries % 2 or keys % 2)
    assert seen == [("cudnn", queries + queries % 2, keys + keys % 2, odd)]
    np.testing.assert_allclose(np.float32(got), formula(*args), atol=2e-2)


@pytest.mark.parametrize(
    ("platform", "name", "function"),
    [
        ("cpu", "auto", attention.cpu),
        ("gpu", "auto", attention.cudnn),
        ("cuda", "auto", attention.cudnn),
        ("rocm", "auto", attention.xla),
        ("tpu", "auto", attention.flash),
        ("cpu", "xla", attention.xla),
        ("tpu", "chunked", attention.chunked),
        ("gpu", "cudnn", attention.cudnn),
        ("tpu", "flash", attention.flash),
    ],
)
def test_choose(platform, name, function):
    assert attention.choose(platform, name=name) is function


def test_choose_refuses_unknown_names_and_what_the_platform_lacks():
    with pytest.raises(ValueError, match="'splash' is unknown; choose one of auto, xla"):
        attention.choose("cpu", name="splash")
    with pytest.raises(ValueError, match="'flash' does not run on 'cpu'"):
        attention.choose("cpu", name="flash")
    with pytest.raises(ValueError, match="does not run on 'tpu'"):
        attention.choose("tpu", name="cudnn")


def test_cpu_takes_chunks_for_long_sequences(monkeypatch):
    monkeypatch.setattr(attention, "chunked", lambda *args: "chunked")
    monkeypatch.setattr(attention, "grouped", lambda *args: "grouped")
    long, short = jnp.zeros((1, 512, 1, 8)), jnp.zeros((8, 256, 8, 8))
    assert attention.cpu(long, long, long) == "chunked"
    assert attention.cpu(short, short, short) == "grouped"


def mesh_of(data, fsdp, tensor):
    names = ("data", "fsdp", "tensor")
    return jax.make_mesh((data, fsdp, tensor), names, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize(
    ("shape", "batch", "heads"),
    [((2, 1, 2), 4, 6), ((2, 2, 1), 4, 3), ((1, 2, 2), 3, 3), ((4, 1, 1), 2, 4)],
)
def test_split_over_a_mesh_equals_one_device(shape, batch, heads, small_chunks):
    mesh = mesh_of(*shape)
    args = qkv(batch=batch, heads=heads)
    function = attention.choose("cpu", mesh, "chunked")
    np.testing.assert_allclose(jax.jit(function)(*args), formula(*args), atol=2e-6)


def test_split_moves_nothing_between_devices(small_chunks):
    mesh = mesh_of(2, 1, 2)
    sharding = NamedSharding(mesh, PartitionSpec("data", None, "tensor", None))
    args = jax.device_put(qkv(batch=4, heads=6), sharding)
    text = jax.jit(attention.choose("cpu", mesh, "chunked")).lower(*args).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text


@pytest.mark.parametrize("queries", [36, 37])
def test_queries_are_split_over_space(queries, small_chunks):
    names = ("data", "fsdp", "tensor", "space")
    mesh = jax.make_mesh((1, 1, 1, 4), names, axis_types=(AxisType.Auto,) * 4)
    function = jax.jit(attention.choose("cpu", mesh, "chunked"))
    args = qkv(queries=queries, heads=6)
    got = function(*args)
    assert got.sharding.shard_shape(got.shape)[1] == (9 if queries == 36 else 37)
    np.testing.assert_allclose(got, formula(*args), atol=2e-6)


def test_equal_choices_are_one_function():
    # a module that holds it is equal too, and hits the cache of a jit that takes it static
    first, second = (attention.choose("cpu", mesh_of(2, 1, 2), "chunked") for _ in range(2))
    assert first is second
