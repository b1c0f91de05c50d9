"""Perceptual distance LPIPS on VGG16 (Zhang et al. 2018; taming's `losses/lpips.py`).

Arrays are [batch, height, width, channels]. The reference leaves the dropout before its last
layers on while it trains; here nothing is random.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
"""(channels over `width`, convolutions) of VGG16 between its poolings."""
WIDTH = 64
# ImageNet's mean and deviation for images in [-1, 1] (`ScalingLayer`)
SHIFT = np.float32([-0.030, -0.088, -0.188])
SCALE = np.float32([0.458, 0.448, 0.450])
EPSILON = 1e-10  # of `normalize_tensor`
SMALLEST = 16
"""Pixels of the shorter side that survive four poolings."""


class VGG16(nn.Module):
    """Images to the features before each pooling and at the end: relu1_2, 2_2, 3_3, 4_3, 5_3."""

    dtype: DTypeLike
    precision: PrecisionLike
    width: int

    @nn.compact
    def __call__(self, x):
        features = []
        for stage, (mult, count) in enumerate(STAGES, 1):
            if features:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for i in range(1, count + 1):
                conv = nn.Conv(
                    self.width * mult,
                    (3, 3),
                    padding=1,
                    kernel_init=nn.initializers.he_normal(),
                    dtype=self.dtype,
                    precision=self.precision,
                    name=f"conv{stage}_{i}",
                )
                x = nn.relu(conv(x))
            features.append(x)
        return features


class ChannelWeights(nn.Module):
    """Weighted sum over channels: the 1x1 convolution to one channel that LPIPS has learned."""

    @nn.compact
    def __call__(self, x):
        # weights that were never learned: the mean over stages of distances between unit vectors
        weights = self.param("scale", nn.initializers.constant(1 / len(STAGES)), (x.shape[-1],))
        return jnp.einsum("bhwc,c->bhw", x, weights, precision=jax.lax.Precision.HIGHEST)


class LPIPS(nn.Module):
    """Distance between the images of two batches [B, H, W, c] in [-1, 1], c 3 or 1: float32 [B].

    Convolutions are computed in `dtype`, all else in float32; `precision=HIGHEST` for a metric.
    ValueError for images of different shapes, of other channels, or below 16 pixels a side.
    """

    dtype: DTypeLike = jnp.float32
    precision: PrecisionLike = None
    width: int = WIDTH
    """Channels of the first stage; another than VGG16's for smaller random features."""

    @nn.compact
    def __call__(self, a, b):
        check(a.shape, b.shape)
        vgg = VGG16(self.dtype, self.precision, self.width, name="vgg")
        total_b = jnp.zeros(len(a))
        # two passes, not one of both batches: that would move images between devices
        for i, (x, y) in enumerate(zip(vgg(_standardized(a)), vgg(_standardized(b)))):
            difference = jnp.square(_unit(x) - _unit(y))
            weighted_bhw = ChannelWeights(name=f"lin{i}")(difference)
            total_b += jnp.mean(weighted_bhw, axis=(1, 2))
        return total_b


def random_params(key: jax.Array, width: int = WIDTH) -> dict:
    """Parameters without the published weights; distances in them are named "random features"."""
    return jax.jit(LPIPS(width=width).init)(key, *_images())["params"]


def shapes(width: int = WIDTH) -> dict:
    """Shapes of the parameters."""
    return jax.eval_shape(LPIPS(width=width).init, jax.random.key(0), *_images())["params"]


def _images():
    image = jnp.zeros((1, SMALLEST, SMALLEST, 3))
    return image, image


def check(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    """ValueError if LPIPS cannot compare batches of shapes `a` and `b`."""
    if a != b or len(a) != 4:
        raise ValueError(f"LPIPS compares batches [B, H, W, c] of one shape, not {a} and {b}")
    if a[-1] not in (1, 3) or min(a[1:3]) < SMALLEST:
        raise ValueError(
            f"images of shape {a}: LPIPS takes 3 channels (or 1, repeated) and sides of at least"
            f" {SMALLEST} pixels"
        )


def _standardized(image):
    """1 channel is repeated, as torch's broadcasting does in the reference."""
    return (image.astype(jnp.float32) - SHIFT[None, None, None]) / SCALE[None, None, None]


def _unit(x):
    """Features of length one at every pixel; where all are zero, zero with a gradient of zero."""
    x = x.astype(jnp.float32)
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    some = squared > 0
    length = jnp.sqrt(jnp.where(some, squared, 1.0))
    return jnp.where(some, x / (length + EPSILON), 0.0)
