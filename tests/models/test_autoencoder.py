"""First stages compute what the reference computes, have its names and sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from reference import case, draw, filled, max_difference

from ldm_jax import schema
from ldm_jax.convert import compvis
from ldm_jax.models import attention, autoencoder

KEY = jax.random.key(0)

TINY = schema.AutoencoderKLConfig(
    channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_downsample=(2,), embed_dim=3
)
VQ = schema.AutoencoderVQConfig(
    channels=32, channel_mult=(1, 1), num_res_blocks=0, embed_dim=2, z_channels=4, num_codes=8
)


@functools.cache
def model_and_params(config):
    model = autoencoder.from_config(config, precision="highest")
    shapes = jax.eval_shape(model.init, KEY, *autoencoder.example_inputs(model))
    return model, filled(shapes["params"])


@functools.cache
def method(model, name):
    return jax.jit(lambda params, x: model.apply({"params": params}, x, method=name))


def encode(model, params, x):
    return method(model, "encode")(params, x)


def decode(model, params, z):
    return method(model, "decode")(params, z)


@pytest.mark.parametrize("name", ["kl_f4", "kl_f8_attn"])
def test_equals_the_reference(name):
    about, state_dict, arrays = case(f"ae_{name}")
    config = {"ddconfig": about["ddconfig"], "embed_dim": about["embed_dim"]}
    model, params = compvis.load_first_stage(config, state_dict)
    model = model.clone(precision="highest")
    mean, logvar = encode(model, params, arrays["x"])
    image = decode(model, params, arrays["mean"])
    assert mean.dtype == logvar.dtype == image.dtype == jnp.float32
    np.testing.assert_allclose(mean, arrays["mean"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(logvar, arrays["logvar"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(image, arrays["reconstruction"], rtol=0, atol=2e-5)


def test_quantized_equals_the_reference():
    about, state_dict, arrays = case("ae_vq_f4")
    config = {name: about[name] for name in ("ddconfig", "embed_dim", "n_embed")}
    model, params = compvis.load_first_stage(config, state_dict)
    model = model.clone(precision="highest")
    z = encode(model, params, arrays["x"])
    codes, indices = method(model, "quantize")(params, z)
    image = decode(model, params, z)  # quantizes first
    assert z.dtype == codes.dtype == image.dtype == jnp.float32
    np.testing.assert_allclose(z, arrays["prequant"], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(indices, arrays["indices"])
    np.testing.assert_array_equal(codes, params["quantize"]["embedding"][indices])
    np.testing.assert_allclose(image, arrays["reconstruction"], rtol=0, atol=2e-5)


def test_decoding_quantizes_unless_told_otherwise():
    model, params = model_and_params(VQ)
    z = 3 * draw(1, 4, 4, 2)
    codes, _ = model.apply({"params": params}, z, method="quantize")
    as_it_is = jax.jit(
        lambda z: model.apply({"params": params}, z, quantize=False, method="decode")
    )
    np.testing.assert_allclose(decode(model, params, z), as_it_is(codes), atol=1e-6)
    assert float(np.abs(as_it_is(z) - as_it_is(codes)).max()) > 0.01


def test_gradients_pass_the_codebook_to_the_encoder():
    model, params = model_and_params(VQ)
    x = draw(1, 4, 4, 3)

    def loss(params):
        return jnp.mean(jnp.square(model.apply({"params": params}, x) - x))

    grads = jax.jit(jax.grad(loss))(params)
    assert float(jnp.abs(grads["encoder"]["conv_in"]["kernel"]).max()) > 1e-4
    assert not grads["quantize"]["embedding"].any()


def test_quantized_computes_low_but_compares_codes_in_float32():
    model, params = model_and_params(VQ)
    low, x = model.clone(dtype=jnp.bfloat16), draw(1, 4, 4, 3)
    z = encode(low, params, x)
    codes, indices = method(low, "quantize")(params, z)
    assert z.dtype == codes.dtype == jnp.float32
    np.testing.assert_array_equal(codes, params["quantize"]["embedding"][indices])
    assert 1e-4 < np.abs(z - encode(model, params, x)).max() / np.abs(z).max() < 0.05


def test_identity_is_the_images():
    config = schema.IdentityFirstStageConfig(in_channels=1)
    model = autoencoder.from_config(config, dtype=jnp.bfloat16)
    (example,) = autoencoder.example_inputs(model)
    assert (example.shape, model.init(KEY, example)) == ((1, 1, 1, 1), {})
    x = draw(2, 3, 5, 1)
    for name in ("encode", "decode", None):
        np.testing.assert_array_equal(model.apply({"params": {}}, x, method=name), x)
    with pytest.raises(ValueError, match=r"images of shape .* takes \[batch, height, width, 1\]"):
        model.apply({"params": {}}, draw(2, 3, 5, 3), method="encode")


def test_attention_where_the_config_says():
    _, params = model_and_params(TINY)
    with_attention = {
        name.split("/attentions_")[0]
        for name in traverse_util.flatten_dict(params, sep="/")
        if "/attentions_" in name
    }
    assert with_attention == {
        "encoder/down_blocks_1",
        "encoder/mid_block",
        "decoder/mid_block",
        "decoder/up_blocks_0",
    }
    config = dataclasses.replace(TINY, mid_attention=False, attention_downsample=())
    _, params = model_and_params(config)
    assert not any("attention" in name for name in traverse_util.flatten_dict(params, sep="/"))


@pytest.mark.parametrize(("bias", "limit"), [(1000.0, 20.0), (-1000.0, -30.0)])
def test_log_variance_is_clamped_and_the_mean_is_not(bias, limit):
    model, params = model_and_params(TINY)
    moved = params | {"quant_conv": params["quant_conv"] | {"bias": np.full(6, bias, np.float32)}}
    mean, logvar = encode(model, moved, draw(1, 8, 8, 3))
    np.testing.assert_array_equal(logvar, np.full((1, 4, 4, 3), limit))
    assert np.abs(mean).min() > 900


def test_decode_does_not_clip():
    model, params = model_and_params(TINY)
    assert np.abs(decode(model, params, 10 * draw(1, 4, 4, 3))).max() > 1.5


@pytest.mark.slow
def test_remat_keeps_names_and_gradients():
    model, params = model_and_params(TINY)
    x = draw(2, 8, 8, 3)

    def gradient(model):
        return jax.grad(lambda p: jnp.mean((model.apply({"params": p}, x) - x) ** 2))

    again = model.clone(remat=True)
    want, got = jax.jit(gradient(model))(params), jax.jit(gradient(again))(params)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(want))
    assert max_difference(got, want) < 1e-5 * largest
    assert "remat" not in str(jax.make_jaxpr(gradient(model))(params))
    # encoder: 2 + 2 resnets, 1 + 1 attentions; decoder: 4 + 2 and 2 + 1
    assert str(jax.make_jaxpr(gradient(again))(params)).count("remat") >= 15


def test_bfloat16_and_chunked_attention_stay_close(monkeypatch):
    monkeypatch.setattr(attention, "CHUNK_LOGITS", 64)
    model, params = model_and_params(TINY)
    x = draw(1, 8, 8, 3)
    mean, _ = encode(model, params, x)
    chunked, _ = encode(model.clone(attention=attention.chunked), params, x)
    np.testing.assert_allclose(chunked, mean, atol=1e-5)
    low, logvar = encode(model.clone(dtype=jnp.bfloat16), params, x)
    assert low.dtype == logvar.dtype == jnp.float32
    assert 1e-4 < np.abs(low - mean).max() / np.abs(mean).max() < 0.05


def test_dropout_acts_in_training_only():
    model, params = model_and_params(dataclasses.replace(TINY, dropout=0.5))
    x = draw(1, 8, 8, 3)

    def mean(train, key):
        rngs = {"dropout": jax.random.key(key)}
        return model.apply({"params": params}, x, train, method="encode", rngs=rngs)[0]

    still, moving = (jax.jit(functools.partial(mean, train)) for train in (False, True))
    np.testing.assert_array_equal(still(0), still(1))
    assert np.abs(moving(0) - moving(1)).max() > 0.01


@pytest.mark.parametrize("shape", [(1, 8, 8, 4), (1, 9, 8, 3), (1, 8, 7, 3)])
@pytest.mark.parametrize("config", [TINY, VQ])
def test_refuses_images_that_do_not_fit(config, shape):
    model, params = model_and_params(config)
    with pytest.raises(ValueError, match=r"images of shape .* takes \[batch, height, width, 3\]"):
        encode(model, params, draw(*shape))


@pytest.mark.parametrize("config", [TINY, VQ])
def test_from_config_passes_every_field(config):
    model = autoencoder.from_config(config, dtype=jnp.bfloat16, remat=True)
    of_the_loss = {"beta", "legacy", "codebook_decay"}
    for field in {f.name for f in dataclasses.fields(config)} - of_the_loss:
        assert getattr(model, field) == getattr(config, field)
    assert (model.dtype, model.remat) == (jnp.bfloat16, True)
