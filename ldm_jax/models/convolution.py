"""Convolution as one function, chosen for the target devices and passed to the modules.

A convolution here is called as `flax.linen.Conv` calls `jax.lax.conv_general_dilated`, on
[B, H, W, C] and kernels [height, width, in, out], without dilation or groups.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jax.sharding import Mesh

ConvolutionFunction = Callable[..., jax.Array]

xla = jax.lax.conv_general_dilated

PIXELS_PER_CHANNEL = 2
"""Output pixels of the batch over input channels up to which `cpu` takes `columns`: measured
on kernels of 3x3; see benchmarks/README.md."""
TINY_IMAGE = 4
"""Pixels of an image up to which `cpu` takes `columns` whatever the batch: at 2x2 they are 2 to 46
times faster, from 1 to 256 images and 96 to 640 channels."""


def columns(x, kernel, window_strides, padding, precision: PrecisionLike = None):
    """One matrix product of the pixels under the kernel, side by side, with the whole kernel.

    The pixels are gathered again in the backward pass: stored, they would be as many times larger
    than `x` as the kernel has pixels.
    """
    height, width, _, channels = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows = 1 + (x.shape[1] - height) // window_strides[0]
    cols = 1 + (x.shape[2] - width) // window_strides[1]

    @jax.checkpoint
    def product(x, kernel):
        taps = [
            jax.lax.slice_in_dim(
                jax.lax.slice_in_dim(
                    x, i, i + (rows - 1) * window_strides[0] + 1, window_strides[0], 1
                ),
                j,
                j + (cols - 1) * window_strides[1] + 1,
                window_strides[1],
                2,
            )
            for i in range(height)
            for j in range(width)
        ]
        return jnp.einsum(
            "pc,cd->pd",
            jnp.concatenate(taps, axis=-1).reshape(len(x) * rows * cols, -1),
            kernel.reshape(-1, channels),
            precision=precision,
        )

    return product(x, kernel).reshape(len(x), rows, cols, channels)


def pointwise(x, kernel, window_strides, padding, *, precision: PrecisionLike = None, **layout):
    """A convolution with a 1x1 kernel as a matrix product on the channels.

    On CPUs the product is up to 2.5 times as fast, its gradients up to 5 times. In bfloat16 it
    stays XLA's convolution: TPUs fuse norms and SiLUs into convolutions, but write them out before
    products. See benchmarks/README.md. For stride 1 without padding.
    """
    if x.dtype == jnp.bfloat16:
        return xla(x, kernel, window_strides, padding, precision=precision, **layout)
    return jnp.einsum("bhwc,cd->bhwd", x, kernel[0, 0], precision=precision)


def cpu(x, kernel, window_strides, padding, *, precision: PrecisionLike = None, **layout):
    """`columns` for large kernels on few pixels, `xla` elsewhere."""
    stride = window_strides[0] * window_strides[1]
    pixels = x.shape[1] * x.shape[2] // stride
    few = pixels <= TINY_IMAGE or len(x) * pixels <= PIXELS_PER_CHANNEL * x.shape[3]
    if few and kernel.shape[0] > 1:
        return columns(x, kernel, window_strides, padding, precision)
    return xla(x, kernel, window_strides, padding, precision=precision, **layout)


def choose(platform: str, mesh: Mesh | None = None) -> ConvolutionFunction:
    """The convolution for modules that will run on `platform`: cpu, gpu, cuda, rocm or tpu.

    `platform` is that of the target devices, as for `attention.choose`. `xla` where `mesh` splits
    images over `space`: the compiler would gather the pixels of `columns` on every device.
    """
    split = mesh is not None and "space" in mesh.shape
    return cpu if platform == "cpu" and not split else xla
