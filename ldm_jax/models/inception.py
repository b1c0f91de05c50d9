"""Inception-v3 as TensorFlow released it on 2015-12-05: the network behind FID.

Layers and parameters are named as in the PyTorch ports (pytorch-fid, torch-fidelity). It differs
from torchvision's Inception-v3: average pooling leaves padding out of the mean, the last block
pools by maximum, and there are 1008 logits. Convolutions run at the highest precision everywhere:
the default of TPUs and of GPUs is not float32.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.lax import Precision

SIDE = 299
"""Side of the images that the network was trained on."""
CLASSES = 1008  # TensorFlow's padded number, not torchvision's 1000
LAYERS = ("64", "192", "768", "2048")
"""Layers that a Frechet distance may be taken in, named by their width."""
Preprocess = Literal["torch_fidelity", "pytorch_fid"]


class InceptionV3(nn.Module):
    """Images [B, 299, 299, 3] as `prepare` makes them -> dict of float32 features [B, width].

    "64", "192", "768", "2048": means over all positions after the first and second maximum pooling,
    after Mixed_6e and after Mixed_7c. FID and its relatives take "2048".
    "spatial": the first 7 channels of Mixed_6d's 1x1 branch, position by position: those of sFID
    (guided-diffusion, evaluations/evaluator.py: `mixed_6/conv:0`).
    "logits", and "logits_unbiased" without the last layer's bias: those of the Inception score.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        outputs = {}
        x = ConvNorm(32, (3, 3), 2, name="Conv2d_1a_3x3")(x)
        x = ConvNorm(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
        x = ConvNorm(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        outputs["64"] = _mean(x)
        x = ConvNorm(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = ConvNorm(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        outputs["192"] = _mean(x)
        for name, width in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = BlockA(width, name=name)(x)
        x = BlockB(name="Mixed_6a")(x)
        for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160)):
            x = BlockC(width, name=name)(x)
        x = BlockC(160, name="Mixed_6d")(x)
        outputs["spatial"] = x[..., :7].reshape(len(x), -1)  # the 1x1 branch comes first
        x = BlockC(192, name="Mixed_6e")(x)
        outputs["768"] = _mean(x)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE("mean", name="Mixed_7b")(x)
        x = BlockE("max", name="Mixed_7c")(x)
        outputs["2048"] = _mean(x)
        outputs["logits_unbiased"], outputs["logits"] = Logits(name="fc")(outputs["2048"])
        return outputs


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalization with its stored moments, ReLU."""

    width: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: str = ""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(
            self.width,
            self.kernel,
            self.stride,
            # a stride goes with no padding, everywhere in this network
            padding=self.padding or ("SAME" if self.stride == 1 else "VALID"),
            use_bias=False,
            kernel_init=nn.initializers.he_normal(),
            precision=Precision.HIGHEST,
            name="conv",
        )(x)
        return nn.relu(Moments(name="bn")(x))


class Moments(nn.Module):
    """Batch normalization by the stored moments."""

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.param("mean", nn.initializers.zeros, shape)
        var = self.param("var", nn.initializers.ones, shape)
        factor = scale / jnp.sqrt(var + 1e-3)
        return x * factor[None, None, None] + (bias - mean * factor)[None, None, None]


class Logits(nn.Module):
    """The last layer: without its bias, and with it."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], CLASSES))
        bias = self.param("bias", nn.initializers.zeros, (CLASSES,))
        unbiased = jnp.dot(x, kernel, precision=Precision.HIGHEST)
        return unbiased, unbiased + bias[None]


class BlockA(nn.Module):
    """35x35."""

    pool_width: int

    @nn.compact
    def __call__(self, x):
        one = ConvNorm(64, (1, 1), name="branch1x1")(x)
        five = ConvNorm(48, (1, 1), name="branch5x5_1")(x)
        five = ConvNorm(64, (5, 5), name="branch5x5_2")(five)
        three = ConvNorm(64, (1, 1), name="branch3x3dbl_1")(x)
        three = ConvNorm(96, (3, 3), name="branch3x3dbl_2")(three)
        three = ConvNorm(96, (3, 3), name="branch3x3dbl_3")(three)
        pool = ConvNorm(self.pool_width, (1, 1), name="branch_pool")(_pool(x, "mean"))
        return jnp.concatenate([one, five, three, pool], axis=-1)


class BlockB(nn.Module):
    """35x35 to 17x17."""

    @nn.compact
    def __call__(self, x):
        three = ConvNorm(384, (3, 3), 2, name="branch3x3")(x)
        double = ConvNorm(64, (1, 1), name="branch3x3dbl_1")(x)
        double = ConvNorm(96, (3, 3), name="branch3x3dbl_2")(double)
        double = ConvNorm(96, (3, 3), 2, name="branch3x3dbl_3")(double)
        return jnp.concatenate([three, double, nn.max_pool(x, (3, 3), (2, 2))], axis=-1)


class BlockC(nn.Module):
    """17x17, with kernels of 7 in one direction at a time."""

    width: int

    @nn.compact
    def __call__(self, x):
        one = ConvNorm(192, (1, 1), name="branch1x1")(x)
        seven = ConvNorm(self.width, (1, 1), name="branch7x7_1")(x)
        seven = ConvNorm(self.width, (1, 7), name="branch7x7_2")(seven)
        seven = ConvNorm(192, (7, 1), name="branch7x7_3")(seven)
        double = ConvNorm(self.width, (1, 1), name="branch7x7dbl_1")(x)
        double = ConvNorm(self.width, (7, 1), name="branch7x7dbl_2")(double)
        double = ConvNorm(self.width, (1, 7), name="branch7x7dbl_3")(double)
        double = ConvNorm(self.width, (7, 1), name="branch7x7dbl_4")(double)
        double = ConvNorm(192, (1, 7), name="branch7x7dbl_5")(double)
        pool = ConvNorm(192, (1, 1), name="branch_pool")(_pool(x, "mean"))
        return jnp.concatenate([one, seven, double, pool], axis=-1)


class BlockD(nn.Module):
    """17x17 to 8x8."""

    @nn.compact
    def __call__(self, x):
        three = ConvNorm(192, (1, 1), name="branch3x3_1")(x)
        three = ConvNorm(320, (3, 3), 2, name="branch3x3_2")(three)
        seven = ConvNorm(192, (1, 1), name="branch7x7x3_1")(x)
        seven = ConvNorm(192, (1, 7), name="branch7x7x3_2")(seven)
        seven = ConvNorm(192, (7, 1), name="branch7x7x3_3")(seven)
        seven = ConvNorm(192, (3, 3), 2, name="branch7x7x3_4")(seven)
        return jnp.concatenate([three, seven, nn.max_pool(x, (3, 3), (2, 2))], axis=-1)


class BlockE(nn.Module):
    """8x8; `pool` is "mean" or "max"."""

    pool: str

    @nn.compact
    def __call__(self, x):
        one = ConvNorm(320, (1, 1), name="branch1x1")(x)
        three = ConvNorm(384, (1, 1), name="branch3x3_1")(x)
        double = ConvNorm(448, (1, 1), name="branch3x3dbl_1")(x)
        double = ConvNorm(384, (3, 3), name="branch3x3dbl_2")(double)
        split = [
            ConvNorm(384, kernel, name=f"{name}{letter}")(h)
            for h, name in ((three, "branch3x3_2"), (double, "branch3x3dbl_3"))
            for letter, kernel in (("a", (1, 3)), ("b", (3, 1)))
        ]
        pool = ConvNorm(192, (1, 1), name="branch_pool")(_pool(x, self.pool))
        return jnp.concatenate([one, *split, pool], axis=-1)


def _pool(x: jax.Array, kind: str) -> jax.Array:
    """Mean (without the padding) or maximum of 3x3, as large as `x`."""
    if kind == "max":
        return nn.max_pool(x, (3, 3), padding="SAME")
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=(1, 2))


# --- from pixels to the network's input -------------------------------------------------------


def prepare(pixels: jax.Array, how: Preprocess = "torch_fidelity") -> jax.Array:
    """Pixels [B, H, W, 3], float32 in 0..255 -> [B, 299, 299, 3] in about [-1, 1].

    "torch_fidelity": the bilinear filter of TensorFlow 1 and (x - 128) / 128, as in the released
    graph; torch-fidelity and the ADM suite do so. "pytorch_fid": pixel centres aligned, and
    2 x / 255 - 1. Neither averages over pixels where it makes an image smaller.
    """
    if how == "torch_fidelity":
        return (resize_like_tensorflow1(pixels, SIDE) - 128) / 128
    shape = (len(pixels), SIDE, SIDE, pixels.shape[-1])
    resized = jax.image.resize(
        pixels / 255, shape, "linear", antialias=False, precision=Precision.HIGHEST
    )
    return 2 * resized - 1


def resize_like_tensorflow1(x: jax.Array, side: int) -> jax.Array:
    """Bilinear to `side`: output pixel i takes input position i * in / out, without half pixels.

    As tensorflow 1's `resize_bilinear(align_corners=False)` (resize_bilinear_op.cc).
    """
    for axis in (2, 1):
        size = x.shape[axis]
        at = np.arange(side, dtype=np.float32) * np.float32(size / side)
        low = at.astype(np.int32)
        part = np.expand_dims(at - low.astype(np.float32), tuple(range(1, x.ndim - axis)))
        part = np.expand_dims(part, tuple(range(axis)))
        below = jnp.take(x, low, axis=axis)
        above = jnp.take(x, np.minimum(low + 1, size - 1), axis=axis)
        x = below + (above - below) * part
    return x
