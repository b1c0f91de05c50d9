"""Autoencoder with a KL-regularized latent: the first stage (`diffusionmodules/model.py`).

The parameter tree is that of diffusers' Flax autoencoder. Arrays are [batch, height, width,
channels].
"""

import dataclasses

import einops
import jax.numpy as jnp
from flax import linen as nn
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from ldm_jax import schema
from ldm_jax.models.attention import AttentionFunction, xla
from ldm_jax.models.blocks import (
    AutoencoderResBlock,
    Downsample,
    Upsample,
    conv,
    dense,
    group_norm,
)


class AutoencoderAttention(nn.Module):
    """Self-attention of one head over the positions of the image (`model.AttnBlock`)."""

    dtype: DTypeLike = jnp.float32
    attention: AttentionFunction = xla
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x):
        height, width, channels = x.shape[1:]
        low = {"dtype": self.dtype, "precision": self.precision}
        h = group_norm(channels, 1e-6, name="group_norm", dtype=self.dtype)(x)
        h_bqc = einops.rearrange(h, "b h w c -> b (h w) c")
        qkv = (dense(channels, channels, name=n, **low)(h_bqc) for n in ("query", "key", "value"))
        out_bqnd = self.attention(*(a[:, :, None] for a in qkv), precision=self.precision)
        out_bqc = dense(channels, channels, name="proj_attn", **low)(out_bqnd[:, :, 0])
        return x + einops.rearrange(out_bqc, "b (h w) c -> b h w c", h=height, w=width)


class Level(nn.Module):
    """Residual blocks of one resolution, with attention or none, and the way to the next one."""

    channels: int
    num_layers: int
    with_attention: bool
    resample: str | None
    """"down", "up" or None."""
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    attention: AttentionFunction = xla
    remat: bool = False
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x, train=False):
        low = {"dtype": self.dtype, "precision": self.precision}
        resnet, attend = _blocks(self.remat)
        for i in range(self.num_layers):
            x = resnet(self.channels, self.dropout, name=f"resnets_{i}", **low)(x, train)
            if self.with_attention:
                x = attend(attention=self.attention, name=f"attentions_{i}", **low)(x)
        if self.resample == "down":
            x = Downsample(padding=(0, 1), name="downsamplers_0", **low)(x)
        elif self.resample == "up":
            x = Upsample(name="upsamplers_0", **low)(x)
        return x


class MidBlock(nn.Module):
    """Residual block, attention unless switched off, residual block at the lowest resolution."""

    with_attention: bool
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    attention: AttentionFunction = xla
    remat: bool = False
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x, train=False):
        channels = x.shape[-1]
        low = {"dtype": self.dtype, "precision": self.precision}
        resnet, attend = _blocks(self.remat)
        x = resnet(channels, self.dropout, name="resnets_0", **low)(x, train)
        if self.with_attention:
            x = attend(attention=self.attention, name="attentions_0", **low)(x)
        return resnet(channels, self.dropout, name="resnets_1", **low)(x, train)


def _blocks(remat: bool):
    if remat:
        return nn.remat(AutoencoderResBlock, static_argnums=(2,)), nn.remat(AutoencoderAttention)
    return AutoencoderResBlock, AutoencoderAttention


class Encoder(nn.Module):
    """Image to `out_channels` feature maps at the latent's resolution (`model.Encoder`)."""

    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_downsample: tuple[int, ...]
    mid_attention: bool
    out_channels: int
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    attention: AttentionFunction = xla
    remat: bool = False
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x, train=False):
        low = {"dtype": self.dtype, "precision": self.precision}
        block = {**low, "dropout": self.dropout, "attention": self.attention, "remat": self.remat}
        x = conv(x.shape[-1], self.channels, name="conv_in", **low)(x)
        last = len(self.channel_mult) - 1
        for level, mult in enumerate(self.channel_mult):
            x = Level(
                channels=self.channels * mult,
                num_layers=self.num_res_blocks,
                with_attention=2**level in self.attention_downsample,
                resample="down" if level < last else None,
                name=f"down_blocks_{level}",
                **block,
            )(x, train)
        x = MidBlock(self.mid_attention, name="mid_block", **block)(x, train)
        x = nn.silu(group_norm(x.shape[-1], 1e-6, name="conv_norm_out", dtype=self.dtype)(x))
        return conv(x.shape[-1], self.out_channels, name="conv_out", **low)(x)


class Decoder(nn.Module):
    """Feature maps at the latent's resolution to an image (`model.Decoder`)."""

    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_downsample: tuple[int, ...]
    mid_attention: bool
    out_channels: int
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    attention: AttentionFunction = xla
    remat: bool = False
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x, train=False):
        low = {"dtype": self.dtype, "precision": self.precision}
        block = {**low, "dropout": self.dropout, "attention": self.attention, "remat": self.remat}
        x = conv(x.shape[-1], self.channels * self.channel_mult[-1], name="conv_in", **low)(x)
        x = MidBlock(self.mid_attention, name="mid_block", **block)(x, train)
        for i, level in enumerate(reversed(range(len(self.channel_mult)))):
            x = Level(
                channels=self.channels * self.channel_mult[level],
                num_layers=self.num_res_blocks + 1,
                with_attention=2**level in self.attention_downsample,
                resample="up" if level > 0 else None,
                name=f"up_blocks_{i}",
                **block,
            )(x, train)
        x = nn.silu(group_norm(x.shape[-1], 1e-6, name="conv_norm_out", dtype=self.dtype)(x))
        return conv(x.shape[-1], self.out_channels, name="conv_out", **low)(x)


class AutoencoderKL(nn.Module):
    """Image to mean and log-variance of its latent, latent to image (`ldm/models/autoencoder.py`).

    Fields up to `dropout` are those of `schema.AutoencoderKLConfig`. Parameters are float32,
    computation is in `dtype`; `remat` recomputes the blocks in the backward pass; `attention` comes
    from `attention.choose`. Initialize through `__call__`; use `method="encode"` and "decode".
    """

    in_channels: int
    out_channels: int
    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_downsample: tuple[int, ...]
    mid_attention: bool
    z_channels: int
    embed_dim: int
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    attention: AttentionFunction = xla
    remat: bool = False
    precision: PrecisionLike = None

    def setup(self):
        low = {"dtype": self.dtype, "precision": self.precision}
        both = {
            "channels": self.channels,
            "channel_mult": self.channel_mult,
            "num_res_blocks": self.num_res_blocks,
            "attention_downsample": self.attention_downsample,
            "mid_attention": self.mid_attention,
            "dropout": self.dropout,
            "attention": self.attention,
            "remat": self.remat,
        }
        self.encoder = Encoder(out_channels=2 * self.z_channels, **both, **low)
        self.quant_conv = conv(2 * self.z_channels, 2 * self.embed_dim, 1, **low)
        self.post_quant_conv = conv(self.embed_dim, self.z_channels, 1, **low)
        self.decoder = Decoder(out_channels=self.out_channels, **both, **low)

    def encode(self, x, train=False):
        """(mean, logvar) of images in [-1, 1]: float32 [B, h, w, embed_dim], logvar in [-30, 20].

        `train` turns dropout on. Raises ValueError when the images do not fit the model.
        """
        size = 2 ** (len(self.channel_mult) - 1)
        if x.shape[-1] != self.in_channels or x.shape[1] % size or x.shape[2] % size:
            raise ValueError(
                f"images of shape {x.shape}: the first stage takes [batch, height, width,"
                f" {self.in_channels}] with sides that are multiples of {size}"
            )
        moments = self.quant_conv(self.encoder(x, train)).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z, train=False):
        """Images, float32 [B, H, W, out_channels], of unscaled latents; not clipped."""
        return self.decoder(self.post_quant_conv(z), train).astype(jnp.float32)

    def __call__(self, x):
        """The image decoded from the mean of its latent; touches every parameter."""
        mean, _ = self.encode(x)
        return self.decode(mean)


def from_config(
    config: schema.AutoencoderKLConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    attention: AttentionFunction = xla,
    remat: bool = False,
    precision: PrecisionLike = None,
) -> AutoencoderKL:
    """The autoencoder that `config` describes; the other arguments are `AutoencoderKL`'s."""
    return AutoencoderKL(
        **dataclasses.asdict(config),
        dtype=dtype,
        attention=attention,
        remat=remat,
        precision=precision,
    )


def example_inputs(autoencoder: AutoencoderKL) -> tuple:
    """The smallest image that `autoencoder` takes, all zeros: what `init` needs."""
    size = 2 ** (len(autoencoder.channel_mult) - 1)
    return (jnp.zeros((1, size, size, autoencoder.in_channels)),)
