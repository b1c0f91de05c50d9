"""One image over the axis `space` of a mesh: the same pixels, and no device holds a whole layer."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import draw, filled

from ldm_jax import bundle, sampling, schema, sharding
from ldm_jax.conditioning import Cond
from ldm_jax.configs import tiny
from ldm_jax.models import attention, autoencoder, convolution, unet

HEIGHT, WIDTH = 32, 16  # of the latent, four times and twice that of training
STEPS = 2
COND = Cond(context=draw(1, 1, tiny.WIDTH))
NULL = Cond(context=draw(1, 1, tiny.WIDTH, seed=2))


def model(mesh=None):
    """tiny:class with parameters that are nowhere zero, for one device or for `mesh`."""
    recipe = tiny.get_config("class")
    config = schema.LatentDiffusionConfig(
        first_stage=tiny.first_stage().model, unet=recipe.unet, cond=recipe.cond, size=16
    )
    key = jax.random.key(0)
    net, stage = unet.from_config(config.unet), autoencoder.from_config(config.first_stage)
    params = {
        "unet": filled(jax.eval_shape(net.init, key, *unet.example_inputs(net)))["params"],
        "first_stage": filled(
            jax.eval_shape(stage.init, key, *autoencoder.example_inputs(stage)), seed=1
        )["params"],
        "cond_stage": {},
    }
    how = {
        "attention": attention.choose("cpu", mesh),
        "convolution": convolution.choose("cpu", mesh),
    }
    return bundle.build(config, params, 0.5, **how)


def sampler(mesh=None):
    """(compiled sample(params, keys), parameters) of latents of HEIGHT x WIDTH."""
    found = model(mesh)
    shape = (HEIGHT, WIDTH, tiny.LATENT)
    sample = sampling.make_sampler(found, shape=shape, steps=STEPS)
    run = lambda params, keys: sample(params, COND, keys, NULL, 3.0)  # noqa: E731
    out = None if mesh is None else sharding.image_sharding(mesh)
    params, keys = found.params, sampling.keys_of(0, range(1))
    if mesh is not None:
        params, keys = jax.device_put((params, keys), sharding.replicated(mesh))
    quick = {"xla_backend_optimization_level": 0}
    compiled = jax.jit(run, out_shardings=out, compiler_options=quick).lower(params, keys).compile()
    return compiled, params, keys


@pytest.fixture(scope="module")
def both():
    """The sampler, decoding, on one device and over four."""
    return sampler(), sampler(sharding.spatial_mesh(4))


def test_the_pixels_are_those_of_one_device(both, record_property):
    (one, *arguments), (four, *spread) = both
    expected, found = one(*arguments), four(*spread)
    assert found.shape == (1, 2 * HEIGHT, 2 * WIDTH, 3)
    assert {s.data.shape for s in found.addressable_shards} == {(1, HEIGHT // 2, 2 * WIDTH, 3)}
    difference = float(np.abs(np.asarray(found) - expected).max())
    record_property("difference", difference)
    assert np.abs(expected).max() > 1
    assert difference < 1e-4


def largest(compiled, params):
    """Elements of the largest image or token array in the program of one device.

    The rest are parameters, and the logits of the decoder's attention, as wide as it has tokens.
    """
    shapes = re.findall(r"(?:f32|bf16)\[([\d,]+)\]", compiled.as_text())
    shapes = {tuple(map(int, shape.split(","))) for shape in shapes}
    shapes -= {x.shape for x in jax.tree.leaves(params)}
    return max(math.prod(shape) for shape in shapes if shape[-1] < HEIGHT * WIDTH)


def test_no_device_holds_a_whole_layer(both):
    (one, params, _), (four, *_) = both
    whole = 2 * HEIGHT * WIDTH * 96  # of the UNet's widest layer, guided; the decoder's is 2/3
    assert largest(one, params) >= whole
    # a quarter, and rows of the neighbours
    assert largest(four, params) <= 0.35 * whole
    alone, each = (c.memory_analysis().temp_size_in_bytes for c in (one, four))
    assert each < 0.45 * alone
    # neighbours exchange rows
    assert "collective-permute" in four.as_text()


@pytest.mark.slow
def test_a_height_that_deeper_levels_cannot_split_evenly():
    mesh = sharding.spatial_mesh(4)
    # of 12 rows four devices have 3 each; of the 6 of the second level some have none
    net = unet.from_config(tiny.get_config("class").unet)
    shapes = jax.eval_shape(net.init, jax.random.key(0), *unet.example_inputs(net))
    params = filled(shapes)["params"]
    x = draw(1, 12, 8, tiny.LATENT)
    run = jax.jit(lambda x: net.apply({"params": params}, x, jnp.array([7]), COND.context))
    expected = run(x)
    found = run(jax.device_put(x, sharding.image_sharding(mesh)))
    assert found.sharding.shard_shape(found.shape)[1] == 3
    np.testing.assert_allclose(found, expected, atol=1e-4)
