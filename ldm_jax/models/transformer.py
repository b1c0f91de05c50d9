"""Attention blocks of the UNet: plain self-attention, and transformers that read the context.

Axes: b batch, q image positions, l context tokens, c channels, n heads, d width of a head.
"""

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from ldm_jax.models.attention import AttentionFunction, xla
from ldm_jax.models.blocks import (
    conv,
    dense,
    group_norm,
    initializers,
    numerics,
    one_pass,
    repeat_for,
)


class AttentionBlock(nn.Module):
    """Self-attention over the positions (`openaimodel.AttentionBlock`); starts as identity."""

    num_heads: int
    dtype: DTypeLike = jnp.float32
    attention: AttentionFunction = xla
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x, context_blc=None):
        del context_blc  # accepted so that both kinds of block are called alike
        height, width, channels = x.shape[1:]
        num = numerics(self)
        h = group_norm(channels, 1e-5, name="group_norm", dtype=self.dtype)(x)
        h_bqc = einops.rearrange(h, "b h w c -> b (h w) c")
        qkv = (dense(channels, channels, name=f"to_{part}", **num)(h_bqc) for part in "qkv")
        split = (einops.rearrange(a, "b q (n d) -> b q n d", n=self.num_heads) for a in qkv)
        out_bqnd = self.attention(*split, precision=self.precision)
        out_bqc = einops.rearrange(out_bqnd, "b q n d -> b q (n d)")
        out_bqc = dense(channels, channels, zero=True, name="to_out_0", **num)(out_bqc)
        return x + einops.rearrange(out_bqc, "b (h w) c -> b h w c", h=height, w=width)


class Attention(nn.Module):
    """Attention to `context_blc`, or to the image without one (`attention.CrossAttention`).

    Keys and values of the context are saved in the collection "context" where that is mutable, and
    taken from it where it is given.
    """

    num_heads: int
    upcast: bool = False
    """Attend in float32."""
    dtype: DTypeLike = jnp.float32
    attention: AttentionFunction = xla
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x_bqc, context_blc=None):
        channels = x_bqc.shape[-1]
        source = x_bqc if context_blc is None else context_blc
        num = numerics(self)

        def project(a, part):
            a = dense(a.shape[-1], channels, use_bias=False, name=f"to_{part}", **num)(a)
            return einops.rearrange(a, "b l (n d) -> b l n d", n=self.num_heads)

        q_bqnd = project(x_bqc, "q")
        # a sampler makes keys and values of its context once, before its loop over levels
        if context_blc is not None and self.has_variable("context", "keys_values"):
            k_blnd, v_blnd = self.get_variable("context", "keys_values")
        else:
            k_blnd, v_blnd = project(source, "k"), project(source, "v")
            # not in init, which would return them beside the parameters
            if context_blc is not None and not self.is_initializing():
                made = (k_blnd, v_blnd)
                self.sow("context", "keys_values", made, reduce_fn=lambda _, new: new)
        if self.upcast:  # logits of Stable Diffusion 2.1 are beyond what float16 can hold
            q_bqnd, k_blnd, v_blnd = (a.astype(jnp.float32) for a in (q_bqnd, k_blnd, v_blnd))
        out_bqnd = self.attention(q_bqnd, k_blnd, v_blnd, precision=self.precision)
        out_bqc = einops.rearrange(out_bqnd, "b q n d -> b q (n d)").astype(self.dtype)
        return dense(channels, channels, name="to_out_0", **num)(out_bqc)


class TwoHalves(nn.Module):
    """A dense layer whose output is returned in two halves.

    In bfloat16 they are two products: a TPU then fuses the second with the op that follows, and
    never writes the whole width. In float32 it is one, because a CPU would copy the weights for
    two.
    """

    channels: int
    """Channels of each half."""
    dtype: DTypeLike = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x):
        kernel_init, bias_init = initializers(x.shape[-1])
        kernel = self.param("kernel", kernel_init, (x.shape[-1], 2 * self.channels))
        bias = self.param("bias", bias_init, (2 * self.channels,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)

        def product(kernel, bias):
            out = jnp.einsum("...c,cd->...d", x, kernel, precision=self.precision)
            return out + jnp.broadcast_to(bias, out.shape)

        if x.dtype != jnp.bfloat16:
            return jnp.split(product(kernel, bias), 2, axis=-1)
        kernels, biases = jnp.split(kernel, 2, axis=-1), jnp.split(bias, 2)
        return [product(*half) for half in zip(kernels, biases)]


class GEGLU(nn.Module):
    """Linear layer to twice the width; the second half, through an exact GELU, gates the first."""

    channels: int
    dtype: DTypeLike = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x):
        num = numerics(self)
        value, gate = TwoHalves(self.channels, name="proj", **num)(x)
        # the erf of PyTorch's GELU: jax.nn.gelu has erfc, which takes twice as long
        gate = gate.astype(jnp.float32)
        gate *= 0.5 * (1 + jax.lax.erf(gate * np.float32(np.sqrt(0.5))))
        return value * gate.astype(value.dtype)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back (`attention.FeedForward`)."""

    dtype: DTypeLike = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        num = numerics(self)
        x = GEGLU(4 * channels, name="net_0", **num)(x)
        return dense(4 * channels, channels, name="net_2", **num)(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each after a LayerNorm.

    (`attention.BasicTransformerBlock`) Examples are repeated for the context where it is first
    read.
    """

    num_heads: int
    only_cross_attention: bool = False
    """The self-attention reads the context too (`disable_self_attn`)."""
    upcast: bool = False
    dtype: DTypeLike = jnp.float32
    attention: AttentionFunction = xla
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x_bqc, context_blc=None):
        num = numerics(self)
        heads = {
            "num_heads": self.num_heads,
            "upcast": self.upcast,
            "attention": self.attention,
        }
        first = context_blc if self.only_cross_attention else None

        def norm(name):
            fast = one_pass(x_bqc)
            return nn.LayerNorm(1e-5, use_fast_variance=fast, dtype=self.dtype, name=name)

        # under guidance an image has two contexts: what is before the first of them runs once
        if self.only_cross_attention:
            x_bqc = repeat_for(x_bqc, context_blc)
        x_bqc += Attention(name="attn1", **heads, **num)(norm("norm1")(x_bqc), first)
        x_bqc = repeat_for(x_bqc, context_blc)
        x_bqc += Attention(name="attn2", **heads, **num)(norm("norm2")(x_bqc), context_blc)
        x_bqc += FeedForward(name="ff", **num)(norm("norm3")(x_bqc))
        return x_bqc


class SpatialTransformer(nn.Module):
    """Transformer over the positions (`attention.SpatialTransformer`); starts as identity."""

    num_heads: int
    depth: int = 1
    linear_projection: bool = False
    """proj_in and proj_out are dense instead of 1x1 convolutions: their shape differs."""
    only_cross_attention: bool = False
    upcast: bool = False
    dtype: DTypeLike = jnp.float32
    attention: AttentionFunction = xla
    remat: bool = False
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x, context_blc=None):
        height, width, channels = x.shape[1:]
        num = numerics(self)
        block = nn.remat(TransformerBlock) if self.remat else TransformerBlock

        def project(name, zero=False):
            if self.linear_projection:
                return dense(channels, channels, zero=zero, name=name, **num)
            return conv(channels, channels, 1, zero=zero, name=name, **num)

        # 1e-6 here and 1e-5 in residual blocks: the reference's epsilons, which its weights know
        h = project("proj_in")(group_norm(channels, 1e-6, name="norm", dtype=self.dtype)(x))
        h_bqc = einops.rearrange(h, "b h w c -> b (h w) c")
        for i in range(self.depth):
            name = f"transformer_blocks_{i}"
            h_bqc = block(
                self.num_heads,
                self.only_cross_attention,
                self.upcast,
                attention=self.attention,
                name=name,
                **num,
            )(h_bqc, context_blc)
        h = einops.rearrange(h_bqc, "b (h w) c -> b h w c", h=height, w=width)
        return repeat_for(x, h) + project("proj_out", zero=True)(h)
