"""Discriminator of patches, PatchGAN (Isola et al. 2017; taming's `discriminator/model.py`).

Arrays are [batch, height, width, channels]. Statistics are those of the whole batch on any mesh:
under `jit` a mean over a batch that is split over devices is a mean over all of them.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from ldm_jax.models.blocks import numerics

WIDEST = 8
"""Channels of a layer over `width`, at most."""
MOMENTUM = 0.1
"""Share of a new batch in BatchNorm's running statistics (torch's default)."""


class BatchNorm(nn.Module):
    """torch's BatchNorm2d, in float32; a batch is normalized by its own statistics in training.

    The running variance is the unbiased one, as in torch. "batch_stats": mean [c], var [c].
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        channels = x.shape[-1]
        # N(1, 0.02), as `weights_init` of the reference
        scale = self.param("scale", lambda k, s: 1 + 0.02 * jax.random.normal(k, s), (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        x = x.astype(jnp.float32)
        mean, var = running_mean.value, running_var.value
        if train:
            mean = jnp.mean(x, axis=(0, 1, 2))
            var = jnp.mean(jnp.square(x - _channels(mean)), axis=(0, 1, 2))
            if not self.is_initializing():
                count = math.prod(x.shape[:3])
                unbiased = jax.lax.stop_gradient(var) * (count / max(count - 1, 1))
                running_mean.value += MOMENTUM * (jax.lax.stop_gradient(mean) - running_mean.value)
                running_var.value += MOMENTUM * (unbiased - running_var.value)
        factor = jax.lax.rsqrt(var + 1e-5) * scale
        return ((x - _channels(mean)) * _channels(factor) + _channels(bias)).astype(self.dtype)


class ActNorm(nn.Module):
    """scale * (x + loc) per channel, which normalizes the first batch of training (taming's).

    "batch_stats": loc [c] and scale [c] from that batch, and `initialized`. The parameters are what
    is learned after it, added to these: their gradients, and Adam's steps, are those of the
    reference, which overwrites its parameters by that batch's statistics.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        channels = x.shape[-1]
        loc_change = self.param("loc", nn.initializers.zeros, (channels,))
        scale_change = self.param("scale", nn.initializers.zeros, (channels,))
        loc = self.variable("batch_stats", "loc", jnp.zeros, (channels,))
        scale = self.variable("batch_stats", "scale", jnp.ones, (channels,))
        initialized = self.variable("batch_stats", "initialized", jnp.zeros, (), jnp.bool_)
        x = x.astype(jnp.float32)
        if train and not self.is_initializing():
            batch = jax.lax.stop_gradient(x)
            mean = jnp.mean(batch, axis=(0, 1, 2))
            std = jnp.std(batch, axis=(0, 1, 2), ddof=1)
            loc.value = jnp.where(initialized.value, loc.value, -mean)
            scale.value = jnp.where(initialized.value, scale.value, 1 / (std + 1e-6))
            initialized.value = jnp.ones_like(initialized.value)
        shifted = x + _channels(loc.value + loc_change)
        return (_channels(scale.value + scale_change) * shifted).astype(self.dtype)


NORMS = {"batch": BatchNorm, "act": ActNorm}


class PatchGAN(nn.Module):
    """Images [B, H, W, c] to one logit for each patch, float32 [B, h, w, 1]; positive is real.

    `.apply({"params", "batch_stats"}, image, train=True, mutable=["batch_stats"])` normalizes by
    the batch's own statistics and returns (logits, {"batch_stats"}), the running statistics
    updated; without `train` it returns the logits under the running ones. Parameters are float32,
    convolutions are computed in `dtype`. ValueError for images too small to have a patch.
    """

    width: int = 64
    """Channels of the first layer (`ndf`)."""
    layers: int = 3
    """Layers between the first and the last, of which all but one halve the image (`n_layers`)."""
    norm: str = "batch"
    """"batch" or "act" (`use_actnorm`)."""
    dtype: DTypeLike = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, image, train=False):
        check(self, image.shape)
        num = numerics(self)
        bias = self.norm != "batch"  # which has one of its own
        x = nn.leaky_relu(_conv(image.shape[-1], self.width, 2, name="conv_in", **num)(image), 0.2)
        for i in range(1, self.layers + 1):
            channels = self.width * min(2**i, WIDEST)
            strides = 2 if i < self.layers else 1
            x = _conv(x.shape[-1], channels, strides, bias, name=f"conv_{i}", **num)(x)
            x = NORMS[self.norm](self.dtype, name=f"norm_{i}")(x, train)
            x = nn.leaky_relu(x, 0.2)
        return _conv(x.shape[-1], 1, 1, name="conv_out", **num)(x).astype(jnp.float32)


def check(model: PatchGAN, shape: tuple[int, ...]) -> None:
    """ValueError for an invalid discriminator, or images [B, H, W, c] too small for a patch."""
    if model.layers < 1 or model.norm not in NORMS:
        raise ValueError(
            f"discriminator with layers {model.layers} and norm {model.norm!r}: give at least one"
            f" layer and one of {', '.join(NORMS)}"
        )
    smallest = 3 * 2**model.layers
    if min(shape[1:3]) < smallest:
        raise ValueError(
            f"images of shape {tuple(shape)} are too small for a discriminator of {model.layers}"
            f" layers, which needs sides of at least {smallest}: take fewer layers"
        )


def from_config(
    config: Any, *, dtype: DTypeLike = jnp.float32, precision: PrecisionLike = None
) -> PatchGAN:
    """The discriminator of a `schema.DiscriminatorConfig`."""
    return PatchGAN(config.width, config.layers, config.norm, dtype, precision)


def smallest_image(model: PatchGAN, channels: int) -> jax.Array:
    """The smallest image that `model` takes, all zeros, for `init`."""
    side = 3 * 2**model.layers
    return jnp.zeros((1, side, side, channels))


def _conv(
    in_channels: int, channels: int, strides: int, bias: bool = True, *, name: str, dtype, precision
) -> nn.Conv:
    bound = 1 / math.sqrt(16 * in_channels)
    return nn.Conv(
        channels,
        (4, 4),
        strides=strides,
        padding=1,
        use_bias=bias,
        kernel_init=nn.initializers.normal(0.02),
        # `weights_init` of the reference leaves the biases at torch's default
        bias_init=lambda k, s, d=jnp.float32: jax.random.uniform(k, s, d, -bound, bound),
        dtype=dtype,
        precision=precision,
        name=name,
    )


def _channels(x_c: jax.Array) -> jax.Array:
    return x_c[None, None, None]
