"""Tiles give what one pass gives, wherever they meet and however uneven the image is."""

import jax
import numpy as np
import pytest
from reference import draw, filled

from ldm_jax import latents, schema
from ldm_jax.large import tiling
from ldm_jax.models import autoencoder

SCALE = 0.5
SMALL = {"channels": 32, "channel_mult": (1, 1, 1), "num_res_blocks": 1}
KL = schema.AutoencoderKLConfig(**SMALL)
VQ = schema.AutoencoderVQConfig(**SMALL, embed_dim=3, num_codes=32)
TILE = (32, 28)  # of an image of 64 x 40: 5 x 4 tiles at the lower of two levels, 4 x 2 above


def model(config):
    first_stage = autoencoder.from_config(config)
    example = autoencoder.example_inputs(first_stage)
    return first_stage, filled(jax.eval_shape(first_stage.init, jax.random.key(0), *example))


def uneven(*shape):
    """No part of it has the mean and variance of the whole."""
    x = draw(*shape)
    x[:, : shape[1] // 2] *= 0.1
    x[:, :, shape[2] // 3 :] += 0.7
    return x


@pytest.mark.parametrize("config", [KL, pytest.param(VQ, marks=pytest.mark.slow)], ids=["kl", "vq"])
def test_decode_is_that_of_one_pass(config, record_property):
    first_stage, variables = model(config)
    z = uneven(2, 16, 10, config.embed_dim)
    full = jax.jit(lambda p: latents.decode(first_stage, p, z, SCALE))
    tiled = jax.jit(lambda p: tiling.decode(first_stage, p, z, SCALE, tile=TILE))
    expected, found = full(variables["params"]), tiled(variables["params"])
    difference = float(np.abs(found - expected).max())
    record_property("difference", difference)
    assert found.shape == expected.shape == (2, 64, 40, 3)
    assert np.abs(expected).max() > 1
    assert difference < 5e-5


def test_encode_is_that_of_one_pass(record_property):
    first_stage, variables = model(KL)
    image, keys = uneven(2, 64, 40, 3), jax.random.split(jax.random.key(1), 2)
    full = jax.jit(lambda p: latents.encode(first_stage, p, image, SCALE, keys))
    tiled = jax.jit(lambda p: tiling.encode(first_stage, p, image, SCALE, keys, tile=TILE))
    expected, found = full(variables["params"]), tiled(variables["params"])
    difference = float(np.abs(found - expected).max())
    record_property("difference", difference)
    assert found.shape == expected.shape == (2, 16, 10, 4)
    assert difference < 5e-5


@pytest.mark.parametrize("size", [9, 16, 17, 50, 121])
def test_every_pixel_is_given_by_one_tile_far_from_its_borders(size):
    tile, halo = 9, 3
    starts, given = tiling._cuts(size, tile, halo)
    pixels = np.concatenate([np.arange(*each) for each in given])
    np.testing.assert_array_equal(pixels, np.arange(size))
    for start, (first, end) in zip(starts, given):
        assert 0 <= start <= size - tile
        assert first - start >= halo or first == start == 0
        assert start + tile - end >= halo or end == start + tile == size


def test_an_image_within_one_tile_takes_one_pass():
    first_stage, variables = model(KL)
    z, image = draw(1, 8, 7, 4), draw(1, 32, 28, 3)

    def program(module, kind, x, **arguments):
        call = lambda x: getattr(module, kind)(  # noqa: E731
            first_stage, variables["params"], x, SCALE, **arguments
        )
        return str(jax.make_jaxpr(call)(x).jaxpr)

    for kind, x in (("decode", z), ("encode", image)):
        assert program(tiling, kind, x, tile=TILE) == program(latents, kind, x)


def test_without_a_first_stage_nothing_changes():
    first_stage = autoencoder.from_config(schema.IdentityFirstStageConfig())
    image = draw(1, 64, 40, 3)
    np.testing.assert_array_equal(tiling.encode(first_stage, {}, image, SCALE), SCALE * image)
    np.testing.assert_array_equal(tiling.decode(first_stage, {}, image, SCALE), image / SCALE)


def shape_of(config, z, **arguments):
    first_stage, variables = model(config)
    run = lambda p: tiling.decode(first_stage, p, z, SCALE, **arguments)  # noqa: E731
    return jax.eval_shape(run, variables["params"]).shape


def test_levels_with_attention_are_not_tiled():
    config = schema.AutoencoderKLConfig(**SMALL, attention_downsample=(2,))
    # a second level would need tiles of 28 pixels
    assert shape_of(config, draw(1, 16, 10, 4), tile=(16, 16)) == (1, 64, 40, 3)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (KL, {"tile": (24, 32)}, r"tile \(24, 32\): .* 12 pixels .* at least 28"),
        (KL, {"tile": TILE, "levels": 0}, "levels=0 .* no level to tile"),
        (schema.AutoencoderKLConfig(**SMALL, attention_downsample=(1,)), {"tile": TILE},
         r"attention_downsample=\(1,\): there is no level to tile"),
    ],
)  # fmt: skip
def test_impossible_tiles_are_refused(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        shape_of(config, draw(1, 16, 10, 4), **arguments)
