"""The transformer encoder of the text and layout models (`encoders/modules.py`, BERTEmbedder).

Only its tokenizer is BERT's. Parameters are named as in diffusers' LDMBertModel.
Axes: b batch, l tokens, c channels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from ldm_jax import schema
from ldm_jax.models.blocks import dense, numerics
from ldm_jax.models.self_attention import SelfAttention, check_length, layer_norm
from ldm_jax.schema import sizes as config_sizes


class BERTText(nn.Module):
    """ids [B, l] int, l <= max_length -> [B, l, width] float32, after the final norm.

    Fields are those of `schema.BERTTextConfig`. Nothing is masked: padding is attended to, as in
    training. `to_logits` is in every checkpoint, and unused.
    """

    vocab_size: int
    max_length: int
    width: int
    num_layers: int
    num_heads: int
    head_width: int
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    """Recompute each layer in the backward pass."""
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, ids_bl: jax.Array) -> jax.Array:
        check_length(ids_bl, self.max_length)
        num = numerics(self)
        layer = functools.partial(
            nn.remat(Layer) if self.remat else Layer, self.num_heads, self.head_width, **num
        )
        x_blc = Encoder(
            self.vocab_size,
            self.max_length,
            self.width,
            self.num_layers,
            layer,
            self.dtype,
            name="model",
        )(ids_bl)
        if self.is_initializing():
            dense(self.width, self.vocab_size, name="to_logits", **num)(x_blc)
        return x_blc.astype(jnp.float32)


class Encoder(nn.Module):
    """`model` of BERTText."""

    vocab_size: int
    max_length: int
    width: int
    num_layers: int
    make_layer: functools.partial
    dtype: DTypeLike

    @nn.compact
    def __call__(self, ids_bl):
        def embed(count, name):
            init = nn.initializers.normal(0.02)
            return nn.Embed(count, self.width, embedding_init=init, dtype=self.dtype, name=name)

        x_blc = embed(self.vocab_size, "embed_tokens")(ids_bl)
        x_blc += embed(self.max_length, "embed_positions")(jnp.arange(ids_bl.shape[1]))[None]
        for i in range(self.num_layers):
            x_blc = self.make_layer(name=f"layers_{i}")(x_blc)
        return layer_norm("layer_norm", self.dtype)(x_blc)


class Layer(nn.Module):
    """Self-attention and feed-forward, each after a norm and added to its input.

    The heads together may be wider or narrower than the tokens.
    """

    num_heads: int
    head_width: int
    dtype: DTypeLike
    precision: PrecisionLike

    @nn.compact
    def __call__(self, x_blc):
        width, inner = x_blc.shape[-1], self.num_heads * self.head_width
        num = numerics(self)
        attention = SelfAttention(
            self.num_heads,
            self.head_width,
            project=functools.partial(dense, width, use_bias=False, **num),
            project_out=functools.partial(dense, inner, **num),
            precision=self.precision,
            name="self_attn",
        )
        x_blc += attention(layer_norm("self_attn_layer_norm", self.dtype)(x_blc))
        h = layer_norm("final_layer_norm", self.dtype)(x_blc)
        h = nn.gelu(dense(width, 4 * width, name="fc1", **num)(h), approximate=False)
        return x_blc + dense(4 * width, width, name="fc2", **num)(h)


def from_config(
    config: schema.BERTTextConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    precision: PrecisionLike = None,
) -> BERTText:
    """The encoder that `config` describes; the other arguments are `BERTText`'s."""
    config_sizes.check(config, "text encoder")
    return BERTText(**dataclasses.asdict(config), dtype=dtype, remat=remat, precision=precision)
