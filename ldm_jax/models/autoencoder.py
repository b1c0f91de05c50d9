"""First stages: autoencoders with a KL-regularized or quantized latent, and none.

`ldm/models/autoencoder.py` and `diffusionmodules/model.py` of the reference.

The parameter tree is that of diffusers' Flax autoencoder. Arrays are [batch, height, width,
channels].
"""

import dataclasses

import einops
import jax
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
    numerics,
)
from ldm_jax.models.quantize import VectorQuantizer
from ldm_jax.schema import sizes as config_sizes

LAST_FEATURES = "last_features"  # of the decoder, among the intermediates


class AutoencoderAttention(nn.Module):
    """Self-attention of one head over the positions of the image (`model.AttnBlock`)."""

    dtype: DTypeLike = jnp.float32
    attention: AttentionFunction = xla
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x):
        height, width, channels = x.shape[1:]
        num = numerics(self)
        h = group_norm(channels, 1e-6, name="group_norm", dtype=self.dtype)(x)
        h_bqc = einops.rearrange(h, "b h w c -> b (h w) c")
        qkv = (dense(channels, channels, name=n, **num)(h_bqc) for n in ("query", "key", "value"))
        out_bqnd = self.attention(*(a[:, :, None] for a in qkv), precision=self.precision)
        out_bqc = dense(channels, channels, name="proj_attn", **num)(out_bqnd[:, :, 0])
        return x + einops.rearrange(out_bqc, "b (h w) c -> b h w c", h=height, w=width)


class Level(nn.Module):
    """Residual blocks of one resolution, with or without attention, and the resampling to the
    next."""

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
        num = numerics(self)
        resnet, attend = _blocks(self.remat)
        for i in range(self.num_layers):
            x = resnet(self.channels, self.dropout, name=f"resnets_{i}", **num)(x, train)
            if self.with_attention:
                x = attend(attention=self.attention, name=f"attentions_{i}", **num)(x)
        if self.resample == "down":
            # right and below only, as the reference: its weights expect this shift of half a pixel
            x = Downsample(padding=(0, 1), name="downsamplers_0", **num)(x)
        elif self.resample == "up":
            x = Upsample(name="upsamplers_0", **num)(x)
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
        num = numerics(self)
        resnet, attend = _blocks(self.remat)
        x = resnet(channels, self.dropout, name="resnets_0", **num)(x, train)
        if self.with_attention:
            x = attend(attention=self.attention, name="attentions_0", **num)(x)
        return resnet(channels, self.dropout, name="resnets_1", **num)(x, train)


def _blocks(remat: bool):
    if remat:
        return nn.remat(AutoencoderResBlock, static_argnums=(2,)), nn.remat(AutoencoderAttention)
    return AutoencoderResBlock, AutoencoderAttention


class Encoder(nn.Module):
    """Image to `out_channels` feature maps at the latent's resolution (`model.Encoder`).

    `stop` returns the input of that level; `start` continues from it.
    """

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
    def __call__(self, x, train=False, start=None, stop=None):
        num = numerics(self)
        block = {**num, "dropout": self.dropout, "attention": self.attention, "remat": self.remat}
        if start is None:
            x = conv(x.shape[-1], self.channels, name="conv_in", **num)(x)
        last = len(self.channel_mult) - 1
        for level in range(last + 1)[start:stop]:
            x = Level(
                channels=self.channels * self.channel_mult[level],
                num_layers=self.num_res_blocks,
                with_attention=2**level in self.attention_downsample,
                resample="down" if level < last else None,
                name=f"down_blocks_{level}",
                **block,
            )(x, train)
        if stop is not None:
            return x
        x = MidBlock(self.mid_attention, name="mid_block", **block)(x, train)
        x = nn.silu(group_norm(x.shape[-1], 1e-6, name="conv_norm_out", dtype=self.dtype)(x))
        return conv(x.shape[-1], self.out_channels, name="conv_out", **num)(x)


class Decoder(nn.Module):
    """Feature maps at the latent's resolution to an image (`model.Decoder`).

    `stop` returns the activations before the upsampling to `up_blocks_{stop}`; `start` continues
    from them.
    """

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
    def __call__(self, x, train=False, start=None, stop=None):
        num = numerics(self)
        block = {**num, "dropout": self.dropout, "attention": self.attention, "remat": self.remat}
        if start is None:
            x = conv(x.shape[-1], self.channels * self.channel_mult[-1], name="conv_in", **num)(x)
            x = MidBlock(self.mid_attention, name="mid_block", **block)(x, train)
        elif start > 0:
            x = Level(x.shape[-1], 0, False, "up", name=f"up_blocks_{start - 1}", **block)(x)
        levels = len(self.channel_mult)
        for i in range(levels)[start:stop]:
            level = levels - 1 - i
            x = Level(
                channels=self.channels * self.channel_mult[level],
                num_layers=self.num_res_blocks + 1,  # one more than the encoder, as the reference
                with_attention=2**level in self.attention_downsample,
                resample="up" if level > 0 and i + 1 != stop else None,
                name=f"up_blocks_{i}",
                **block,
            )(x, train)
        if stop is not None:
            return x
        x = nn.silu(group_norm(x.shape[-1], 1e-6, name="conv_norm_out", dtype=self.dtype)(x))
        # input of conv_out, whose gradient alone the adaptive weight of the adversarial loss needs
        self.sow("intermediates", LAST_FEATURES, x)
        return conv(x.shape[-1], self.out_channels, name="conv_out", **num)(x)


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
        num = numerics(self)
        self.encoder = _half(self, Encoder, 2 * self.z_channels)
        self.quant_conv = conv(2 * self.z_channels, 2 * self.embed_dim, 1, **num)
        self.post_quant_conv = conv(self.embed_dim, self.z_channels, 1, **num)
        self.decoder = _half(self, Decoder, self.out_channels)

    def encode(self, x, train=False):
        """(mean, logvar) of images in [-1, 1]: float32 [B, h, w, embed_dim], logvar in [-30, 20].

        `train` turns dropout on. Raises ValueError when the images do not fit the model.
        """
        check_images(self, x)
        return self.posterior(self.encoder(x, train))

    def posterior(self, h):
        """(mean, logvar), as of `encode`, from the encoder's output."""
        mean, logvar = jnp.split(self.quant_conv(h).astype(jnp.float32), 2, axis=-1)
        # the reference's bounds (DiagonalGaussianDistribution): exp stays finite in float32
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z, train=False):
        """Images, float32 [B, H, W, out_channels], of unscaled latents; not clipped."""
        return self.decoder(self.post_quant_conv(z), train).astype(jnp.float32)

    def __call__(self, x):
        """The image decoded from the mean of its latent; touches every parameter."""
        mean, _ = self.encode(x)
        return self.decode(mean)


class AutoencoderVQ(nn.Module):
    """Image to latent, latent to its nearest codes to image (`VQModelInterface`).

    Fields up to `dropout` are those of `schema.AutoencoderVQConfig` but for the loss; the others
    are `AutoencoderKL`'s. Initialize through `__call__`; use `method="encode"`, "quantize" and
    "decode".
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
    num_codes: int
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    attention: AttentionFunction = xla
    remat: bool = False
    precision: PrecisionLike = None

    def setup(self):
        num = numerics(self)
        self.encoder = _half(self, Encoder, self.z_channels)
        self.quant_conv = conv(self.z_channels, self.embed_dim, 1, **num)
        # the attribute needs another name than the method, the parameters that of the checkpoint
        self.quantizer = VectorQuantizer(self.num_codes, self.embed_dim, name="quantize")
        self.post_quant_conv = conv(self.embed_dim, self.z_channels, 1, **num)
        self.decoder = _half(self, Decoder, self.out_channels)

    def encode(self, x, train=False):
        """Latents before quantization, float32 [B, h, w, embed_dim], of images in [-1, 1].

        `train` turns dropout on. Raises ValueError when the images do not fit the model.
        """
        check_images(self, x)
        return self.posterior(self.encoder(x, train))

    def posterior(self, h):
        """The latent, as of `encode`, from the encoder's output."""
        return self.quant_conv(h).astype(jnp.float32)

    def quantize(self, z):
        """(codes nearest to latents z, like z; their indices, int32 [B, h, w])."""
        return self.quantizer(z)

    def decode(self, z, train=False, quantize=True):
        """Images, float32 [B, H, W, out_channels], of unscaled latents; not clipped.

        `quantize=False` decodes z as it is (the reference's `force_not_quantize`).
        """
        if quantize:
            z, _ = self.quantize(z)
        return self.decoder(self.post_quant_conv(z), train).astype(jnp.float32)

    def __call__(self, x):
        """The image decoded from its latent's codes; touches every parameter."""
        return self.decode(self.encode(x))


class IdentityFirstStage(nn.Module):
    """No first stage: latents are images (`IdentityFirstStage`). It has no parameters."""

    in_channels: int

    def encode(self, x, train=False):
        """The images. Raises ValueError when they do not have `in_channels`."""
        check_images(self, x)
        return x.astype(jnp.float32)

    def decode(self, z, train=False):
        """The latents."""
        return z.astype(jnp.float32)

    def __call__(self, x):
        """The images."""
        return self.decode(self.encode(x))


FirstStage = AutoencoderKL | AutoencoderVQ | IdentityFirstStage


def _half(model: AutoencoderKL | AutoencoderVQ, kind: type[Encoder | Decoder], out_channels: int):
    """The encoder or decoder of a model."""
    shared = ("channels", "channel_mult", "num_res_blocks", "attention_downsample", "mid_attention")
    how = ("dropout", "dtype", "attention", "remat", "precision")
    return kind(out_channels=out_channels, **{name: getattr(model, name) for name in shared + how})


def check_images(model: FirstStage, x) -> None:
    size = _smallest_side(model)
    if x.shape[-1] != model.in_channels or x.shape[1] % size or x.shape[2] % size:
        raise ValueError(
            f"images of shape {x.shape}: the first stage takes [batch, height, width,"
            f" {model.in_channels}] with sides that are multiples of {size}"
        )


def _smallest_side(model: FirstStage) -> int:
    return 1 if isinstance(model, IdentityFirstStage) else 2 ** (len(model.channel_mult) - 1)


def from_config(
    config: schema.FirstStageModelConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    attention: AttentionFunction = xla,
    remat: bool = False,
    precision: PrecisionLike = None,
) -> FirstStage:
    """The first stage that `config` describes; the other arguments are `AutoencoderKL`'s."""
    config_sizes.check(config, "first_stage")
    fields = dataclasses.asdict(config)
    execution = {"dtype": dtype, "attention": attention, "remat": remat, "precision": precision}
    match config:
        case schema.IdentityFirstStageConfig():
            return IdentityFirstStage(**fields)
        case schema.AutoencoderVQConfig():
            for name in ("beta", "legacy", "codebook_decay"):  # of the loss
                del fields[name]
            return AutoencoderVQ(**fields, **execution)
    return AutoencoderKL(**fields, **execution)


def last_features(state: dict) -> jax.Array:
    """Input of the decoder's last convolution, [B, H, W, channels].

    state: second result of `apply(..., method="decode", mutable=["intermediates"])`.
    """
    return state["intermediates"]["decoder"][LAST_FEATURES][0]


def example_inputs(first_stage: FirstStage) -> tuple:
    """The smallest image that `first_stage` takes, all zeros, for `init`."""
    size = _smallest_side(first_stage)
    return (jnp.zeros((1, size, size, first_stage.in_channels)),)
