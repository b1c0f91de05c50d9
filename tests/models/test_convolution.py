"""The convolutions are equal, in value and gradient, and the CPU's choice goes by shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import draw

from ldm_jax import schema, sharding
from ldm_jax.models import blocks, convolution

SAME = ((1, 1), (1, 1))


def reference(x, kernel, strides, padding):
    return convolution.xla(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )


def value_and_gradients(function, x, kernel, strides, padding):
    """((loss, output), gradients) of a convolution."""

    def loss(x, kernel):
        out = function(x, kernel, strides, padding)
        return jnp.sum(jnp.sin(out)), out

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, kernel)


@pytest.mark.parametrize(
    ("height", "width", "strides", "padding"),
    [
        (4, 4, (1, 1), SAME),
        (2, 5, (1, 1), SAME),
        (6, 4, (2, 2), SAME),
        (6, 4, (2, 2), ((0, 1), (0, 1))),
        (5, 5, (1, 2), ((0, 0), (2, 1))),
    ],
)
def test_columns_equal_xla(height, width, strides, padding):
    x, kernel = draw(2, height, width, 6), draw(3, 3, 6, 5, seed=1)

    def columns(*args):
        return convolution.columns(*args, precision="highest")

    got, want = (value_and_gradients(f, x, kernel, strides, padding) for f in (columns, reference))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), got, want)


@pytest.mark.parametrize(
    ("shape", "kernel_size", "strides", "expected"),
    [
        ((1, 4, 4, 8), 3, 1, True),  # as many pixels as PIXELS_PER_CHANNEL times the channels
        ((2, 4, 4, 8), 3, 1, False),
        ((2, 4, 4, 8), 3, 2, True),  # half the side afterwards
        ((64, 2, 2, 8), 3, 1, True),
        ((1, 4, 4, 8), 1, 2, False),
    ],
)
def test_cpu_gathers_columns_for_few_pixels(shape, kernel_size, strides, expected):
    layer = blocks.conv(8, 8, kernel_size, strides=strides, convolution=convolution.choose("cpu"))
    x = jnp.zeros(shape)
    jaxpr = str(jax.make_jaxpr(lambda x: layer.init_with_output(jax.random.key(0), x)[0])(x))
    assert ("conv_general_dilated" not in jaxpr) == expected


def test_other_platforms_use_xla():
    for platform in ("gpu", "cuda", "rocm", "tpu"):
        assert convolution.choose(platform) is convolution.xla


def test_images_split_over_devices_use_xla():
    assert convolution.choose("cpu", sharding.make_mesh(schema.MeshConfig())) is convolution.cpu
    assert convolution.choose("cpu", sharding.spatial_mesh(4)) is convolution.xla


def test_a_product_on_the_channels_equals_xla():
    x, kernel = draw(2, 3, 4, 6), draw(1, 1, 6, 5, seed=1)

    def pointwise(*args):
        return convolution.pointwise(*args, precision="highest")

    got, want = (
        value_and_gradients(f, x, kernel, (1, 1), ((0, 0), (0, 0))) for f in (pointwise, reference)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), got, want)


@pytest.mark.parametrize(
    ("kernel_size", "strides", "dtype"),
    [(1, 1, "float32"), (1, 2, "float32"), (3, 1, "float32"), (1, 1, "bfloat16")],
)
def test_only_pixels_by_themselves_are_products_and_not_in_bfloat16(kernel_size, strides, dtype):
    module = blocks.conv(32, 32, kernel_size, strides=strides, dtype=dtype)
    program = str(
        jax.make_jaxpr(lambda key, x: module.init_with_output(key, x))(
            jax.random.key(0), jnp.zeros((1, 4, 4, 32))
        )
    )
    product = (kernel_size, strides, dtype) == (1, 1, "float32")
    assert ("conv_general_dilated" in program) == (not product)
