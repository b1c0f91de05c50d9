"""Latents: the scale is in one place, and a row's noise is its key's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import filled

from ldm_jax import latents, schema
from ldm_jax.configs import tiny
from ldm_jax.models import autoencoder as first_stages
from ldm_jax.train import autoencoder

CONFIG = tiny.get_config("first_stage")
SCALE = 0.25
IMAGE = np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def first_stage():
    """(module, parameters)."""
    params = jax.jit(lambda key: autoencoder.init_params(CONFIG, key))(jax.random.key(0))
    return first_stages.from_config(CONFIG.model), params["autoencoder"]


def test_mode_is_the_scaled_mean(first_stage):
    module, params = first_stage
    mean, _ = module.apply({"params": params}, IMAGE, method="encode")
    found = latents.encode(module, params, IMAGE, SCALE)
    assert found.shape == (3, 8, 8, 4)
    np.testing.assert_allclose(found, SCALE * mean, rtol=1e-6)


def test_samples_of_the_posterior_follow_their_row_keys(first_stage):
    module, params = first_stage
    mean, logvar = module.apply({"params": params}, IMAGE, method="encode")
    keys = jax.random.split(jax.random.key(1), 3)
    noise = jnp.stack([jax.random.normal(key, mean.shape[1:]) for key in keys])
    expected = SCALE * (mean + jnp.exp(0.5 * logvar) * noise)
    found = latents.encode(module, params, IMAGE, SCALE, keys)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    alone = latents.encode(module, params, IMAGE[1:2], SCALE, keys[1:2])
    np.testing.assert_allclose(alone, found[1:2], atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        schema.IdentityFirstStageConfig(),
        schema.AutoencoderVQConfig(
            channels=32, channel_mult=(1, 1), num_res_blocks=0, embed_dim=2, num_codes=8
        ),
    ],
)
def test_without_a_posterior_nothing_is_drawn(config):
    module = first_stages.from_config(config)
    params = filled(jax.eval_shape(module.init, jax.random.key(0), IMAGE)).get("params", {})

    @jax.jit
    def run(params):
        z = module.apply({"params": params}, IMAGE, method="encode")
        decoded = module.apply({"params": params}, z, method="decode")  # quantizes if it can
        found = latents.encode(module, params, IMAGE, SCALE)
        keys = jax.random.split(jax.random.key(1), 3)
        drawn = latents.encode(module, params, IMAGE, SCALE, keys)
        return z, decoded, found, drawn, latents.decode(module, params, found, SCALE)

    z, decoded, found, drawn, image = run(params)
    np.testing.assert_allclose(found, SCALE * z, rtol=1e-6)
    assert found.shape == (3, 16 // config.downsample, 16 // config.downsample, config.embed_dim)
    np.testing.assert_array_equal(drawn, found)
    np.testing.assert_allclose(image, decoded, atol=1e-5)


def test_decode_divides_by_the_scale_and_does_not_clip(first_stage):
    module, params = first_stage
    z = 30 * np.random.default_rng(1).normal(size=(2, 8, 8, 4)).astype(np.float32)
    expected = module.apply({"params": params}, z, method="decode")
    found = latents.decode(module, params, SCALE * z, SCALE)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert found.dtype == jnp.float32


def test_std_from_moments_is_that_of_all_batches():
    z = np.random.default_rng(2).normal(3, 2, (5, 64))
    found = latents.std_from_moments(z.mean(1).tolist(), (z**2).mean(1).tolist())
    assert found == pytest.approx(z.std(), rel=1e-9)


@pytest.mark.parametrize("squares", [[1.0], [float("nan")], [float("inf")]])
def test_latents_without_variance_are_refused(squares):
    with pytest.raises(ValueError, match=r"variance is .*: train the first stage longer"):
        latents.std_from_moments([1.0], squares)


@pytest.mark.parametrize("value", [0.0, 0.2, 1e-3, -0.7])
def test_latents_that_are_all_the_same_have_no_scale(value):
    """Not that of their rounding, 1 / std = 34978."""
    z = np.full((16, 8, 8, 4), value, np.float32)
    moments = [(z.mean() * np.float32(1 - 1.2e-7), np.square(z).mean())] * 4
    with pytest.raises(ValueError, match=r"variance is .* unless the training images are"):
        latents.std_from_moments(*zip(*moments))


def test_latents_that_hardly_vary_have_their_own_scale():
    z = 1 + 0.01 * np.random.default_rng(0).standard_normal(10**5)
    assert latents.std_from_moments([z.mean()], [np.square(z).mean()]) == pytest.approx(0.01, 0.02)
