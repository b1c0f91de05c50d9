"""Layers and residual blocks of the UNet and the autoencoders.

Arrays are [batch, height, width, channels]. `conv`, `dense` and `group_norm` make the layers of
Flax with the initialization of the reference, which is PyTorch's default:
U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases. Parameters are float32; a layer computes
in `dtype`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from ldm_jax.models.convolution import ConvolutionFunction, pointwise, xla

GROUPS = 32  # of every GroupNorm


def numerics(module: nn.Module) -> dict[str, Any]:
    """{"dtype", "precision"} of a module, as the layers inside of it take them."""
    return {"dtype": module.dtype, "precision": module.precision}


def conv(
    in_channels: int,
    channels: int,
    kernel_size: int = 3,
    *,
    name: str | None = None,
    strides: int = 1,
    padding: tuple[int, int] | None = None,
    zero: bool = False,
    dtype: DTypeLike = jnp.float32,
    precision: PrecisionLike = None,
    convolution: ConvolutionFunction = xla,
) -> nn.Conv:
    """Square convolution; `padding` is (before, after) on both axes, default: keeps the size.

    `convolution` is for kernels above 1x1. `zero` starts with all parameters zero, as the
    reference's `zero_module`.
    """
    before, after = (kernel_size // 2, kernel_size // 2) if padding is None else padding
    kernel_init, bias_init = initializers(in_channels * kernel_size**2, zero)
    return nn.Conv(
        channels,
        (kernel_size, kernel_size),
        strides=strides,
        padding=((before, after), (before, after)),
        kernel_init=kernel_init,
        bias_init=bias_init,
        dtype=dtype,
        precision=precision,
        conv_general_dilated=pointwise if (kernel_size, strides) == (1, 1) else convolution,
        name=name,
    )


def dense(
    in_channels: int,
    channels: int,
    *,
    name: str | None = None,
    use_bias: bool = True,
    zero: bool = False,
    dtype: DTypeLike = jnp.float32,
    precision: PrecisionLike = None,
) -> nn.Dense:
    """Linear layer on the last axis; `zero` as in `conv`."""
    kernel_init, bias_init = initializers(in_channels, zero)
    return nn.Dense(
        channels,
        use_bias=use_bias,
        kernel_init=kernel_init,
        bias_init=bias_init,
        dtype=dtype,
        precision=precision,
        name=name,
    )


def initializers(fan_in: int, zero: bool = False):
    """(kernel, bias) of a layer as PyTorch starts it, or all zero."""
    if zero:
        return nn.initializers.zeros, nn.initializers.zeros
    bound = 1 / math.sqrt(fan_in)

    def bias_init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    # torch's kaiming_uniform(a=sqrt(5)), which is U(-bound, bound) too
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), bias_init


class GroupNorm(nn.Module):
    """GroupNorm of 32 groups in float32: the means of the channels first, then of their groups.

    Equal to `flax.linen.GroupNorm`, whose one reduction over pixels and channels together is up to
    twice as slow on CPUs, forward and backward. Two passes over float32: a large mean costs no
    digits. One pass over bfloat16, whose rounding has cost more digits already (`one_pass`).
    """

    epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))

        def mean(x):
            """[B, 1, 1, channels], equal within a group."""
            groups = jnp.mean(x, axis=(1, 2)).reshape(len(x), GROUPS, channels // GROUPS)
            return jnp.repeat(jnp.mean(groups, axis=-1), channels // GROUPS, axis=-1)[:, None, None]

        fast, x = one_pass(x), x.astype(jnp.float32)
        average = mean(x)
        if fast:
            variance = jnp.maximum(mean(jnp.square(x)) - jnp.square(average), 0)
        else:
            variance = mean(jnp.square(x - average))
        factor = jax.lax.rsqrt(variance + self.epsilon) * scale[None, None, None]
        # not (x - average) * factor: XLA for CPUs would then store the difference for both uses
        shift = bias[None, None, None] - average * factor
        return (x * factor + shift).astype(self.dtype)


def one_pass(x) -> bool:
    """True if a norm of `x` may compute its variance in one pass, as E[x^2] - E[x]^2.

    In float32 the one pass errs by 2^-24 (mean / deviation)^2 of the variance; rounding `x` to
    bfloat16 has moved its values by 2^-9 (mean / deviation) of the deviation already, which is more
    as long as either leaves a digit. XLA can then fuse the sums into the op that makes `x`.
    """
    return x.dtype == jnp.bfloat16


def group_norm(channels: int, epsilon: float, *, name: str, dtype: DTypeLike) -> GroupNorm:
    """GroupNorm of 32 groups.

    epsilon: 1e-5, torch's default, in the UNet (`GroupNorm32`); 1e-6 in the autoencoders and before
    a spatial transformer (`Normalize`).

    Raises ValueError when `channels` is not a multiple of 32.
    """
    if channels % GROUPS:
        raise ValueError(
            f"{channels} channels cannot be normalized in {GROUPS} groups; make the model's width"
            f" times every multiplier a multiple of {GROUPS}"
        )
    return GroupNorm(epsilon, dtype, name=name)


def timestep_embedding(t_b: jax.Array, channels: int) -> jax.Array:
    """Cosines, then sines of t: float32 [B, channels], channels even (`timestep_embedding`)."""
    half = channels // 2
    # float32 from the start, as in the reference: t multiplies a rounding error by up to 1000
    frequencies = np.exp(np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / half)
    angles = t_b.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def repeat_for(x: jax.Array, other: jax.Array | None) -> jax.Array:
    """Repeat each example of `x` beside itself, on its device, to the batch size of `other`."""
    if other is None or len(other) == len(x):
        return x
    return jnp.repeat(x, len(other) // len(x), axis=0)


def nearest(x: jax.Array) -> jax.Array:
    """Twice the height and width, every pixel repeated; local under a sharding of the height."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


class Downsample(nn.Module):
    """Half the height and width by a strided 3x3 convolution."""

    padding: tuple[int, int]
    """(before, after): (1, 1) in the UNet, (0, 1) in the autoencoders."""
    dtype: DTypeLike = jnp.float32
    precision: PrecisionLike = None
    convolution: ConvolutionFunction = xla

    @nn.compact
    def __call__(self, x, emb=None, train=False):
        del emb, train  # accepted so that a ResBlock can take its place
        channels = x.shape[-1]
        return conv(
            channels,
            channels,
            strides=2,
            padding=self.padding,
            name="conv",
            dtype=self.dtype,
            precision=self.precision,
            convolution=self.convolution,
        )(x)


class Upsample(nn.Module):
    """Twice the height and width: nearest neighbour, then a 3x3 convolution."""

    dtype: DTypeLike = jnp.float32
    precision: PrecisionLike = None
    convolution: ConvolutionFunction = xla

    @nn.compact
    def __call__(self, x, emb=None, train=False):
        del emb, train  # accepted so that a ResBlock can take its place
        channels = x.shape[-1]
        return conv(
            channels,
            channels,
            name="conv",
            dtype=self.dtype,
            precision=self.precision,
            convolution=self.convolution,
        )(nearest(x))


class ResBlock(nn.Module):
    """Residual block of the UNet, with the time embedding (`openaimodel.ResBlock`).

    Starts as its skip connection. `resample` changes the resolution of both branches.
    """

    channels: int
    scale_shift_norm: bool = False
    """The time embedding scales and shifts the second norm instead of being added before it."""
    resample: str | None = None
    """None, "down" (mean of 2x2 pixels) or "up" (nearest neighbour)."""
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    precision: PrecisionLike = None
    convolution: ConvolutionFunction = xla

    @nn.compact
    def __call__(self, x, emb, train=False):
        in_channels = x.shape[-1]
        num = numerics(self)
        square = {**num, "convolution": self.convolution}
        h = nn.silu(group_norm(in_channels, 1e-5, name="norm1", dtype=self.dtype)(x))
        if self.resample is not None:
            resample = _halve if self.resample == "down" else nearest
            h, x = resample(h), resample(x)
        h = conv(in_channels, self.channels, name="conv1", **square)(h)

        width = self.channels * (2 if self.scale_shift_norm else 1)
        emb = dense(emb.shape[-1], width, name="time_emb_proj", **num)(nn.silu(emb))[:, None, None]
        emb = repeat_for(emb, h)
        norm2 = group_norm(self.channels, 1e-5, name="norm2", dtype=self.dtype)
        if self.scale_shift_norm:
            scale, shift = jnp.split(emb, 2, axis=-1)
            h = norm2(h) * (1 + scale) + shift
        else:
            h = norm2(h + emb)
        h = nn.Dropout(self.dropout)(nn.silu(h), deterministic=not train)
        h = conv(self.channels, self.channels, zero=True, name="conv2", **square)(h)
        if in_channels != self.channels:
            x = conv(in_channels, self.channels, 1, name="conv_shortcut", **num)(x)
        return x + h


def _halve(x):
    return nn.avg_pool(x, (2, 2), strides=(2, 2))


class AutoencoderResBlock(nn.Module):
    """Residual block of the autoencoders (`model.ResnetBlock`): no time, no zeros at the start."""

    channels: int
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x, train=False):
        in_channels = x.shape[-1]
        num = numerics(self)
        h = nn.silu(group_norm(in_channels, 1e-6, name="norm1", dtype=self.dtype)(x))
        h = conv(in_channels, self.channels, name="conv1", **num)(h)
        h = nn.silu(group_norm(self.channels, 1e-6, name="norm2", dtype=self.dtype)(h))
        h = nn.Dropout(self.dropout)(h, deterministic=not train)
        h = conv(self.channels, self.channels, name="conv2", **num)(h)
        if in_channels != self.channels:
            x = conv(in_channels, self.channels, 1, name="conv_shortcut", **num)(x)
        return x + h
