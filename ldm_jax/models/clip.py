"""CLIP's text transformer, its image transformer, and their projections into a common space.

The text encoder of Stable Diffusion: OpenAI's ViT-L/14 in version 1, OpenCLIP's ViT-H in version 2.
Parameters are named as in transformers' Flax models. Axes: b batch, l tokens, c channels; images
are [batch, height, width, channels].
"""

import dataclasses
import functools
from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from ldm_jax import schema
from ldm_jax.models.blocks import numerics
from ldm_jax.models.self_attention import Make, SelfAttention, check_length, layer_norm
from ldm_jax.schema import sizes as config_sizes

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Subtracted from the red, green and blue of an image in [0, 1] before the image transformer."""
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""Then divided by this."""


def quick_gelu(x: jax.Array) -> jax.Array:
    """The GELU of OpenAI's weights: x sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable] = {
    "quick_gelu": quick_gelu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


class CLIPText(nn.Module):
    """Text transformer: ids [B, l] int, l <= max_length -> [B, l, width] float32.

    Fields are those of `schema.CLIPTextConfig`. The result is the output of the last or the last
    but one layer after the final norm. Every layer has parameters, whichever is taken.
    """

    vocab_size: int
    max_length: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    activation: str
    layer: str
    dtype: DTypeLike = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, ids_bl: jax.Array) -> jax.Array:
        check_length(ids_bl, self.max_length)
        return TextTransformer(
            make_embeddings=functools.partial(
                TextEmbeddings, self.vocab_size, self.max_length, self.width, self.dtype
            ),
            make_layer=_layer_of(self, causal=True),
            num_layers=self.num_layers,
            layer=self.layer,
            dtype=self.dtype,
            name="text_model",
        )(ids_bl)


class TextTransformer(nn.Module):
    """`text_model` of CLIPText."""

    make_embeddings: Make
    make_layer: Make
    num_layers: int
    layer: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, ids_bl):
        x_blc = self.make_embeddings(name="embeddings")(ids_bl)
        states = Encoder(self.make_layer, self.num_layers, name="encoder")(x_blc)
        # the last norm belongs to the last layer, and Stable Diffusion 2 puts it on the one before
        x_blc = states[{"last": -1, "penultimate": -2}[self.layer]]
        return layer_norm("final_layer_norm", self.dtype)(x_blc).astype(jnp.float32)


class TextEmbeddings(nn.Module):
    """Tokens and their positions."""

    vocab_size: int
    max_length: int
    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, ids_bl):
        tokens = _embed(self.vocab_size, self.width, 0.02, "token_embedding", self.dtype)
        positions = _embed(self.max_length, self.width, 0.01, "position_embedding", self.dtype)
        return tokens(ids_bl) + positions(jnp.arange(ids_bl.shape[1]))[None]


class CLIPVision(nn.Module):
    """Image transformer with its projection: [B, side, side, 3] -> [B, projection_dim] float32.

    Fields are those of `schema.CLIPVisionConfig`; images are normalized with `IMAGE_MEAN` and
    `IMAGE_STD`. The result is not divided by its length.
    """

    image_size: int
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    projection_dim: int
    activation: str
    dtype: DTypeLike = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, images_bhwc: jax.Array) -> jax.Array:
        expected = (self.image_size, self.image_size, 3)
        if images_bhwc.shape[1:] != expected:
            raise ValueError(f"images are {images_bhwc.shape[1:]}, CLIP's are {expected}: resize")
        num = numerics(self)
        pooled_bc = VisionTransformer(
            make_embeddings=functools.partial(
                VisionEmbeddings, self.image_size, self.patch_size, self.width, **num
            ),
            make_layer=_layer_of(self, causal=False),
            num_layers=self.num_layers,
            dtype=self.dtype,
            name="vision_model",
        )(images_bhwc)
        project = nn.Dense(
            self.projection_dim,
            use_bias=False,
            kernel_init=nn.initializers.normal(self.width**-0.5),
            name="visual_projection",
            **num,
        )
        return project(pooled_bc).astype(jnp.float32)


class VisionTransformer(nn.Module):
    """`vision_model` of CLIPVision: the normed state of the class token."""

    make_embeddings: Make
    make_layer: Make
    num_layers: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images_bhwc):
        x_blc = self.make_embeddings(name="embeddings")(images_bhwc)
        x_blc = layer_norm("pre_layrnorm", self.dtype)(x_blc)  # so spelled in the checkpoints
        x_blc = Encoder(self.make_layer, self.num_layers, name="encoder")(x_blc)[-1]
        return layer_norm("post_layernorm", self.dtype)(x_blc[:, 0])


class VisionEmbeddings(nn.Module):
    """A class token and the image's patches, row by row, with their positions."""

    image_size: int
    patch_size: int
    width: int
    dtype: DTypeLike
    precision: PrecisionLike

    @nn.compact
    def __call__(self, images_bhwc):
        std = self.width**-0.5
        class_c = self.param("class_embedding", nn.initializers.normal(std), (self.width,))
        patches_bhwc = nn.Conv(
            self.width,
            (self.patch_size, self.patch_size),
            strides=self.patch_size,
            padding="VALID",
            use_bias=False,
            kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            dtype=self.dtype,
            precision=self.precision,
            name="patch_embedding",
        )(images_bhwc)
        patches_blc = einops.rearrange(patches_bhwc, "b h w c -> b (h w) c")
        class_blc = einops.repeat(class_c.astype(self.dtype), "c -> b 1 c", b=images_bhwc.shape[0])
        x_blc = jnp.concatenate([class_blc, patches_blc], axis=1)
        positions = _embed(x_blc.shape[1], self.width, std, "position_embedding", self.dtype)
        return x_blc + positions(jnp.arange(x_blc.shape[1]))[None]


class Encoder(nn.Module):
    """The layers one after another: the output of each."""

    make_layer: Make
    num_layers: int

    @nn.compact
    def __call__(self, x_blc):
        return Layers(self.make_layer, self.num_layers, name="layers")(x_blc)


class Layers(nn.Module):
    """The layers, in a scope of their own as in the checkpoints."""

    make_layer: Make
    num_layers: int

    @nn.compact
    def __call__(self, x_blc):
        states = []
        for i in range(self.num_layers):
            x_blc = self.make_layer(name=str(i))(x_blc)
            states.append(x_blc)
        return states


class Layer(nn.Module):
    """Self-attention and feed-forward, each after a norm and added to its input."""

    num_layers: int
    """Layers of the whole encoder: the initial weights depend on it."""
    num_heads: int
    mlp_width: int
    activation: str
    causal: bool
    dtype: DTypeLike
    precision: PrecisionLike

    @nn.compact
    def __call__(self, x_blc):
        width = x_blc.shape[-1]
        # OpenAI's initial weights: what a layer adds shrinks with the number of layers, so that
        # the sum of all has the same spread in an encoder of any depth
        std = width**-0.5
        out_std = std * (2 * self.num_layers) ** -0.5
        num = numerics(self)
        attention = SelfAttention(
            self.num_heads,
            width // self.num_heads,
            project=functools.partial(_dense, std, **num),
            project_out=functools.partial(_dense, out_std, **num),
            causal=self.causal,
            precision=self.precision,
            name="self_attn",
        )
        x_blc += attention(layer_norm("layer_norm1", self.dtype)(x_blc))
        feed_forward = MLP(self.mlp_width, self.activation, out_std, name="mlp", **num)
        return x_blc + feed_forward(layer_norm("layer_norm2", self.dtype)(x_blc))


class MLP(nn.Module):
    """Two dense layers with an activation between."""

    hidden: int
    activation: str
    out_std: float
    dtype: DTypeLike
    precision: PrecisionLike

    @nn.compact
    def __call__(self, x_blc):
        width = x_blc.shape[-1]
        num = numerics(self)
        h = _dense((2 * width) ** -0.5, self.hidden, name="fc1", **num)(x_blc)
        h = ACTIVATIONS[self.activation](h)
        return _dense(self.out_std, width, name="fc2", **num)(h)


def text_from_config(
    config: schema.CLIPTextConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    precision: PrecisionLike = None,
) -> CLIPText:
    """The text transformer of `config`. ValueError if it has no such layer or heads."""
    config_sizes.check(config, "text encoder")
    _check_heads(config.width, config.num_heads)
    if config.num_layers < {"last": 1, "penultimate": 2}[config.layer]:
        raise ValueError(f"{config.num_layers} layers have no {config.layer} one")
    return CLIPText(**dataclasses.asdict(config), dtype=dtype, precision=precision)


def embed_text(text: CLIPText, params: dict, ids_bl: jax.Array, end_id: int) -> jax.Array:
    """Ids [B, l] in the space of CLIP's images: [B, projection_dim] float32, of any length.

    params: those of `text`, which gives its last layer, and `text_projection/kernel`.
    end_id: the token whose first occurrence is pooled for the whole text; 2, as in old configs,
    means the highest id of each text (transformers, `modeling_clip.py`).
    """
    states_blc = text.apply({"params": {"text_model": params["text_model"]}}, ids_bl)
    end_b = jnp.argmax(ids_bl if end_id == 2 else ids_bl == end_id, axis=1)
    pooled_bc = jnp.take_along_axis(states_blc, end_b[:, None, None], axis=1)[:, 0]
    kernel = params["text_projection"]["kernel"]
    return jnp.matmul(pooled_bc, kernel, precision=text.precision).astype(jnp.float32)


def vision_from_config(
    config: schema.CLIPVisionConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    precision: PrecisionLike = None,
) -> CLIPVision:
    """The image transformer of `config`. ValueError if heads or patches do not divide its sizes."""
    config_sizes.check(config, "image encoder")
    _check_heads(config.width, config.num_heads)
    if config.image_size % config.patch_size:
        raise ValueError(
            f"image_size {config.image_size} is not a multiple of patch_size {config.patch_size}"
        )
    return CLIPVision(**dataclasses.asdict(config), dtype=dtype, precision=precision)


def _check_heads(width: int, num_heads: int) -> None:
    if width % num_heads:
        raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}")


def _layer_of(model, *, causal: bool) -> Make:
    """Makes the layers of a CLIPText or CLIPVision."""
    return functools.partial(
        Layer,
        model.num_layers,
        model.num_heads,
        model.mlp_width,
        model.activation,
        causal,
        model.dtype,
        model.precision,
    )


def _dense(std: float, channels: int, *, name: str, dtype, precision) -> nn.Dense:
    init = nn.initializers.normal(std)
    return nn.Dense(channels, kernel_init=init, dtype=dtype, precision=precision, name=name)


def _embed(count: int, width: int, std: float, name: str, dtype) -> nn.Embed:
    init = nn.initializers.normal(std)
    return nn.Embed(count, width, embedding_init=init, dtype=dtype, name=name)
