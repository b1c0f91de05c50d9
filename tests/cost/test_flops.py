"""FLOPs counted in jaxprs, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from ldm_jax.cost import flops


def count(f, *args):
    return flops.count(jax.make_jaxpr(f)(*args))


def conv(x, w, stride=1):
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def test_matrix_product_with_batch():
    a, b = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))
    assert count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), a, b) == 2 * 3 * 4 * 5 * 6


def test_convolution():
    x, w = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 7))
    assert count(conv, x, w) == 2 * (2 * 8 * 8 * 7) * (3 * 3 * 3)


def test_scan_counts_every_turn():
    w = jnp.ones((4, 4))

    def loop(x):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=10)[0]

    assert count(loop, jnp.ones((2, 4))) == 10 * 2 * 2 * 4 * 4


def test_cond_counts_its_dearest_branch():
    w = jnp.ones((4, 4))
    f = lambda p, x: jax.lax.cond(p, lambda x: x @ w @ w, lambda x: x @ w, x)  # noqa: E731
    assert count(f, True, jnp.ones((4, 4))) == 2 * 2 * 4**3


def test_tpu_tiles_pad_columns_and_depth_to_128_and_rows_to_8():
    a, b = jnp.ones((3, 4, 40)), jnp.ones((3, 40, 130))
    jaxpr = jax.make_jaxpr(lambda a, b: jnp.einsum("bij,bjk->bik", a, b))(a, b)
    assert flops.count(jaxpr) == 2 * 3 * 4 * 40 * 130
    assert flops.count(jaxpr, padded=True) == 2 * 3 * 8 * 128 * 256


def test_a_pallas_kernel_counts_as_often_as_its_grid_and_its_loops_say():
    def kernel(x_ref, out_ref):
        def turn(_, x):
            return jnp.dot(x, x_ref[...])

        out_ref[...] = jax.lax.fori_loop(0, 5, turn, x_ref[...])

    def call(x):
        spec = pl.BlockSpec((None, 8, 8), lambda i: (i, 0, 0))
        return pl.pallas_call(
            kernel, out_shape=x, grid=(3,), in_specs=[spec], out_specs=spec, name="power"
        )(x)

    x = jax.ShapeDtypeStruct((3, 8, 8), jnp.float32)
    jaxpr = jax.make_jaxpr(jax.jit(call))(x)
    assert flops.count(jaxpr) == 3 * 5 * 2 * 8**3
    padded = 3 * 5 * 2 * 8 * 128 * 128
    assert flops.kernels(jaxpr) == {"power": {((3, 8, 8), (3, 8, 8)): padded}}


def test_gradient_of_a_dense_layer_costs_three_products():
    loss = lambda x, w: jnp.sum(jnp.square(x @ w))  # noqa: E731
    grad = jax.grad(loss, argnums=(0, 1))
    assert count(grad, jnp.ones((8, 4)), jnp.ones((4, 4))) == 3 * 2 * 8 * 4 * 4


@pytest.mark.parametrize("stride", [1, 2])
def test_gradient_of_a_convolution_is_about_three_times_its_cost(stride):
    x, w = jnp.ones((2, 16, 16, 3)), jnp.ones((3, 3, 3, 7))
    f = lambda x, w: conv(x, w, stride)  # noqa: E731
    forward = count(f, x, w)
    both = count(jax.grad(lambda x, w: jnp.sum(jnp.square(f(x, w))), (0, 1)), x, w)
    assert both / forward == pytest.approx(3, rel=0.35)  # padding counts


def test_remat_counts_what_it_computes_again():
    w = jnp.ones((4, 4))
    block = lambda x: jnp.sin(jnp.sin(x @ w) @ w)  # noqa: E731
    loss = lambda f: lambda x: jnp.sum(f(x))  # noqa: E731
    x = jnp.ones((4, 4))
    plain, again = count(jax.grad(loss(block)), x), count(jax.grad(loss(jax.checkpoint(block))), x)
    assert again > plain
