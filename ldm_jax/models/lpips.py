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

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""(channels, convolutions) of VGG16 between its poolings."""
SHIFT = np.float32([-0.030, -0.088, -0.188])
SCALE = np.float32([0.458, 0.448, 0.450])
EPSILON = 1e-10
SMALLEST = 16
"""Pixels of the shorter side that survive four poolings."""


class VGG16(nn.Module):
    """Images to the features before each pooling and at the end: relu1_2, 2_2, 3_3, 4_3, 5_3."""

    dtype: DTypeLike = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x):
        features = []
        for stage, (channels, count) in enumerate(STAGES, 1):
            if features:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for i in range(1, count + 1):
                conv = nn.Conv(
                    channels,
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

    @nn.compact
    def __call__(self, a, b):
        check(a.shape, b.shape)
        vgg = VGG16(self.dtype, self.precision, name="vgg")
        total_b = jnp.zeros(len(a))
        # two passes, not one of both batches: that would move rows between devices
        for i, (x, y) in enumerate(zip(vgg(_standardized(a)), vgg(_standardized(b)))):
            difference = jnp.square(_unit(x) - _unit(y))
            weighted_bhw = ChannelWeights(name=f"lin{i}")(difference)
            total_b += jnp.mean(weighted_bhw, axis=(1, 2))
        return total_b


def random_params(key: jax.Array) -> dict:
    """Parameters without the published weights; distances in them are named "random features"."""
    image = jnp.zeros((1, SMALLEST, SMALLEST, 3))
    return jax.jit(LPIPS().init)(key, image, image)["params"]


def shapes() -> dict:
    """Shapes of the parameters."""
    return jax.eval_shape(random_params, jax.random.key(0))


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
    """Features of length one at every pixel; where all are zero, zero, with a gradient of zero.

    (torch's square root gives that gradient as NaN.)
    """
    x = x.astype(jnp.float32)
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    some = squared > 0
    length = jnp.sqrt(jnp.where(some, squared, 1.0))
    return jnp.where(some, x / (length + EPSILON), 0.0)
