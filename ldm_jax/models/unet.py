"""Time-conditional UNet with every option of the published models (`openaimodel.UNetModel`).

The parameter tree is that of diffusers' Flax UNet; where that lacks a part, torch diffusers' names.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from ldm_jax import schema
from ldm_jax.models.attention import AttentionFunction, xla
from ldm_jax.models.blocks import (
    Downsample,
    ResBlock,
    Upsample,
    conv,
    dense,
    group_norm,
    numerics,
    repeat_for,
    timestep_embedding,
)
from ldm_jax.models.convolution import ConvolutionFunction
from ldm_jax.models.convolution import xla as xla_convolution
from ldm_jax.models.transformer import AttentionBlock, SpatialTransformer
from ldm_jax.schema import sizes as config_sizes

Make = Callable[..., nn.Module]  # a block with all but channels, resample and name filled in


class UNet(nn.Module):
    """Noised latents and their times to the raw prediction; see `__call__`.

    Fields up to `dropout` are those of `schema.UNetConfig`. Parameters are float32, computation is
    in `dtype`; `remat` recomputes the blocks in the backward pass; `attention` comes from
    `attention.choose`.
    """

    in_channels: int
    out_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_downsample: tuple[int, ...]
    num_heads: int | tuple[int, ...] | None = None
    num_head_channels: int | None = None
    spatial_transformer: bool = False
    transformer_depth: int = 1
    context_dim: int | None = None
    only_cross_attention: tuple[bool, ...] = ()
    linear_projection: bool = False
    upcast_attention: bool = False
    scale_shift_norm: bool = False
    resblock_updown: bool = False
    num_classes: int | None = None
    vector_dim: int | None = None
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    attention: AttentionFunction = xla
    remat: bool = False
    precision: PrecisionLike = None
    convolution: ConvolutionFunction = xla_convolution

    @nn.compact
    def __call__(self, x, t_b, context_blc=None, label=None, train=False):
        """The raw prediction, float32 [B, H, W, out_channels].

        x: [B, H, W, in_channels], noised latents and concatenated conditioning.
        t_b: [B], int or float32 in [0, timesteps).
        context_blc: [B, L, context_dim] tokens, exactly when transformers have a context_dim. Of
        [n B, L, context_dim], n i to n i + n - 1 go with x[i], and n B predictions come back; the
        layers before the first transformer's context are computed once for all n.
        label: int [B] for a model with num_classes, float [B, vector_dim] for one with vector_dim.
        train: dropout is on, and draws from the rng "dropout".
        Raises ValueError when an input and the model do not fit.
        """
        self._check(x, context_blc, label)
        num = numerics(self)
        emb = self._embed(t_b, label)
        resnet = self._resnet()
        conv_in = conv(self.in_channels, self.model_channels, name="conv_in", **num)
        given, x = x, conv_in(x)
        repeated = repeat_for(given, context_blc)  # cheaper than repeating the output of conv_in
        skips = [x if repeated is given else conv_in(repeated)]

        last = len(self.channel_mult) - 1
        for level, mult in enumerate(self.channel_mult):
            channels = self.model_channels * mult
            down = DownBlock(
                channels=channels,
                num_layers=self.num_res_blocks,
                resnet=resnet,
                attend=self._attend(level),
                downsample=self._change("down", channels) if level < last else None,
                name=f"down_blocks_{level}",
            )
            x, more = down(x, emb, context_blc, train)
            skips += more

        x = MidBlock(resnet, self._attend(None), name="mid_block")(x, emb, context_blc, train)

        for i, level in enumerate(reversed(range(last + 1))):
            channels = self.model_channels * self.channel_mult[level]
            up = UpBlock(
                channels=channels,
                num_layers=self.num_res_blocks + 1,  # one for the skip of conv_in or a downsampler
                resnet=resnet,
                attend=self._attend(level),
                upsample=self._change("up", channels) if level > 0 else None,
                name=f"up_blocks_{i}",
            )
            x, skips = up(x, skips, emb, context_blc, train)

        h = nn.silu(group_norm(x.shape[-1], 1e-5, name="conv_norm_out", dtype=self.dtype)(x))
        out = conv(x.shape[-1], self.out_channels, zero=True, name="conv_out", **num)(h)
        # float32 in any compute type: guidance and solvers subtract nearly equal predictions
        return out.astype(jnp.float32)

    def _embed(self, t_b, label):
        """Time, and label if there is one, as [B, 4 * model_channels]."""
        num = numerics(self)
        width = 4 * self.model_channels
        emb = TimestepEmbedding(width, name="time_embedding", **num)(
            timestep_embedding(t_b, self.model_channels)
        )
        if self.num_classes is not None:
            init = nn.initializers.normal(1.0)  # torch's Embedding starts as N(0, 1)
            embed = nn.Embed(
                self.num_classes,
                width,
                embedding_init=init,
                dtype=self.dtype,
                name="class_embedding",
            )
            emb += embed(label)
        elif self.vector_dim is not None:
            emb += TimestepEmbedding(width, name="class_embedding", **num)(label)
        return emb

    def _resnet(self) -> Make:
        block = (
            nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock
        )  # 3: train, a bool
        return functools.partial(
            block,
            scale_shift_norm=self.scale_shift_norm,
            dropout=self.dropout,
            dtype=self.dtype,
            precision=self.precision,
            convolution=self.convolution,
        )

    def _change(self, resample: str, channels: int) -> Make:
        """Layer that halves ("down") or doubles ("up") the resolution; called like a resnet."""
        if self.resblock_updown:
            return functools.partial(self._resnet(), channels=channels, resample=resample)
        num = {**numerics(self), "convolution": self.convolution}
        if resample == "down":
            return functools.partial(Downsample, padding=(1, 1), **num)
        return functools.partial(Upsample, **num)

    def _attend(self, level: int | None) -> Make | None:
        """The attention block of a level; of the middle block for None."""
        if level is not None and 2**level not in self.attention_downsample:
            return None
        common = {
            "num_heads": self.heads(level),
            "dtype": self.dtype,
            "attention": self.attention,
            "precision": self.precision,
        }
        only_cross = level is not None and any(self.only_cross_attention[level : level + 1])
        if not self.spatial_transformer:
            block = nn.remat(AttentionBlock) if self.remat else AttentionBlock
            return functools.partial(block, **common)
        return functools.partial(
            SpatialTransformer,
            depth=self.transformer_depth,
            linear_projection=self.linear_projection,
            only_cross_attention=only_cross,
            upcast=self.upcast_attention,
            remat=self.remat,
            **common,
        )

    def heads(self, level: int | None) -> int:
        """Attention heads of a level; of the middle block for None."""
        level = len(self.channel_mult) - 1 if level is None else level
        channels = self.model_channels * self.channel_mult[level]
        if self.num_head_channels is not None:
            heads = channels // max(1, self.num_head_channels)
        else:
            heads = self.num_heads[level] if isinstance(self.num_heads, tuple) else self.num_heads
        if heads < 1 or channels % heads:
            raise ValueError(
                f"{heads} heads at level {level}, which do not divide its {channels} channels:"
                " change num_heads or num_head_channels"
            )
        return heads

    def _check(self, x, context_blc, label):
        """ValueError when inputs do not fit the model."""
        if (self.num_heads is None) == (self.num_head_channels is None):
            raise ValueError(
                f"num_heads={self.num_heads} and num_head_channels={self.num_head_channels}:"
                " give one of them"
            )
        for name in ("num_heads", "only_cross_attention"):
            value = getattr(self, name)
            levels = len(self.channel_mult)
            given = value if name == "num_heads" or value else None
            if isinstance(given, tuple) and len(given) != levels:
                raise ValueError(f"{name}={value}: give one value for each of the {levels} levels")
        if self.num_classes is not None and self.vector_dim is not None:
            raise ValueError(
                f"num_classes={self.num_classes} and vector_dim={self.vector_dim}:"
                " give one of them at most"
            )
        size = 2 ** (len(self.channel_mult) - 1)
        if x.shape[-1] != self.in_channels or x.shape[1] % size or x.shape[2] % size:
            raise ValueError(
                f"x of shape {x.shape}: the UNet takes [batch, height, width, {self.in_channels}]"
                f" with sides that are multiples of {size}"
            )
        context_dim = self.context_dim if self.spatial_transformer else None
        given = None if context_blc is None else context_blc.shape[-1]
        if context_dim != given:
            raise ValueError(f"context of width {given}: the UNet takes width {context_dim}")
        if context_blc is not None and len(context_blc) % len(x):
            raise ValueError(
                f"context of batch {len(context_blc)} for x of batch {len(x)}: give as many, or a"
                " multiple"
            )
        labelled = self.num_classes is not None or self.vector_dim is not None
        if labelled != (label is not None):
            raise ValueError(
                f"the UNet {'needs a' if labelled else 'takes no'} label"
                f" (num_classes={self.num_classes}, vector_dim={self.vector_dim})"
            )


class TimestepEmbedding(nn.Module):
    """Two dense layers with a SiLU between, for the embedding of the time or of a vector."""

    channels: int
    dtype: DTypeLike = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x):
        num = numerics(self)
        x = nn.silu(dense(x.shape[-1], self.channels, name="linear_1", **num)(x))
        return dense(self.channels, self.channels, name="linear_2", **num)(x)


class DownBlock(nn.Module):
    """One level going down; returns its output and the skip connections for the way up."""

    channels: int
    num_layers: int
    resnet: Make
    attend: Make | None
    downsample: Make | None

    @nn.compact
    def __call__(self, x, emb, context_blc, train):
        skips = []
        for i in range(self.num_layers):
            x = self.resnet(self.channels, name=f"resnets_{i}")(x, emb, train)
            if self.attend is not None:
                x = self.attend(name=f"attentions_{i}")(x, context_blc)
            skips.append(x)
        if self.downsample is not None:
            x = self.downsample(name="downsamplers_0")(x, emb, train)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """ResBlock, attention, ResBlock at the lowest resolution."""

    resnet: Make
    attend: Make

    @nn.compact
    def __call__(self, x, emb, context_blc, train):
        channels = x.shape[-1]
        x = self.resnet(channels, name="resnets_0")(x, emb, train)
        x = self.attend(name="attentions_0")(x, context_blc)
        return self.resnet(channels, name="resnets_1")(x, emb, train)


class UpBlock(nn.Module):
    """One level going up, each layer with the last of `skips`; returns its output and the rest."""

    channels: int
    num_layers: int
    resnet: Make
    attend: Make | None
    upsample: Make | None

    @nn.compact
    def __call__(self, x, skips, emb, context_blc, train):
        for i in range(self.num_layers):
            *skips, skip = skips
            x = jnp.concatenate([x, repeat_for(skip, x)], axis=-1)
            x = self.resnet(self.channels, name=f"resnets_{i}")(x, emb, train)
            if self.attend is not None:
                x = self.attend(name=f"attentions_{i}")(x, context_blc)
        if self.upsample is not None:
            x = self.upsample(name="upsamplers_0")(x, emb, train)
        return x, skips


def from_config(
    config: schema.UNetConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    attention: AttentionFunction = xla,
    remat: bool = False,
    precision: PrecisionLike = None,
    convolution: ConvolutionFunction = xla_convolution,
) -> UNet:
    """The UNet of `config`; the other arguments are `UNet`'s."""
    config_sizes.check(config, "unet")
    return UNet(
        **dataclasses.asdict(config),
        dtype=dtype,
        attention=attention,
        remat=remat,
        precision=precision,
        convolution=convolution,
    )


def example_inputs(unet: UNet) -> tuple:
    """The smallest (x, t_b, context_blc, label) that `unet` takes, all zeros, for `init`."""
    size = 2 ** (len(unet.channel_mult) - 1)
    context = label = None
    if unet.spatial_transformer and unet.context_dim is not None:
        context = jnp.zeros((1, 1, unet.context_dim))
    if unet.num_classes is not None:
        label = jnp.zeros(1, jnp.int32)
    elif unet.vector_dim is not None:
        label = jnp.zeros((1, unet.vector_dim))
    return jnp.zeros((1, size, size, unet.in_channels)), jnp.zeros(1), context, label
