"""Turn a batch into the conditioning of the UNet, by the kind of the config."""

import difflib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ldm_jax import schema
from ldm_jax.conditioning import (
    class_label,
    depth,
    embedding,
    hybrid,
    inpaint,
    layout,
    semantic,
    superres,
    text,
    upscale,
)
from ldm_jax.conditioning.kind import Batch, Cond, Dropped, Encode, Example, Kind, Sizes
from ldm_jax.schema import sizes as config_sizes

KINDS: dict[type, Kind] = {
    schema.ClassCondConfig: class_label.KIND,
    schema.TextCondConfig: text.KIND,
    schema.LayoutCondConfig: layout.KIND,
    schema.EmbeddingCondConfig: embedding.KIND,
    schema.InpaintCondConfig: inpaint.KIND,
    schema.SuperResCondConfig: superres.KIND,
    schema.SemanticCondConfig: semantic.KIND,
    schema.DepthCondConfig: depth.KIND,
    schema.UpscaleCondConfig: upscale.KIND,
}
KINDS[schema.HybridCondConfig] = hybrid.join(KINDS)
KINDS[type(None)] = Kind(
    name=lambda config: "no condition",
    sampled_by=lambda config: "unconditional",
    example=lambda config, sizes: {},
    from_batch=lambda *arguments: Cond(),
    has_null=lambda config: False,
    in_turn=lambda config, count: {},
)


def kind_of(config: schema.CondConfig) -> Kind:
    """The functions of the config's kind."""
    return KINDS[type(config)]


def name_of(config: schema.CondConfig) -> str:
    """The condition as users call it, such as "class label" or "text + masked image"."""
    return kind_of(config).name(config)


def sampled_by(config: schema.CondConfig) -> str:
    """Task of `ldm-sample` that draws with such a model, and what it must be given; "" for none."""
    return kind_of(config).sampled_by(config)


def build(
    config: schema.CondConfig, dtype: DTypeLike = jnp.float32, remat: bool = False
) -> nn.Module | None:
    """The module with the learned part of a conditioning, or None if nothing of it is learned.

    `remat` recomputes the layers of a text encoder that trains in the backward pass.
    """
    if config is not None:
        config_sizes.check(config, "cond")
    return kind_of(config).build(config, dtype, remat)


def init(config: schema.CondConfig, cond_stage: Any, key: jax.Array) -> dict:
    """Fresh parameters of `build(config)`; {} if it is None."""
    if cond_stage is None:
        return {}
    shape = kind_of(config).module_input(config)
    return cond_stage.init(key, jnp.zeros(shape, jnp.int32))["params"]


def concat_channels(config: schema.CondConfig, latent_channels: int, image_channels: int) -> int:
    """Channels that concat conditioning adds to the latent's."""
    return kind_of(config).concat_channels(config, latent_channels, image_channels)


def context_width(config: schema.CondConfig) -> tuple[str, int] | None:
    """Field and value of the width of the context tokens; None without any."""
    return kind_of(config).context_width(config)


def example(config: schema.CondConfig, sizes: Sizes) -> dict[str, Example]:
    """Shapes and types of the arrays that a batch must hold, for images of `sizes`, without its
    axis."""
    return kind_of(config).example(config, sizes)


def needs(config: schema.CondConfig) -> tuple[str, ...]:
    """Names of the arrays that a batch must hold."""
    return tuple(example(config, Sizes((1, 1, 1), (1, 1, 1))))


def has_null(config: schema.CondConfig) -> bool:
    """Tell whether there is a null condition, so that guidance is possible."""
    return kind_of(config).has_null(config)


def map_ids(config: schema.CondConfig) -> int | None:
    """Number of classes that a segmentation map may hold; None for another kind."""
    return config.num_classes if isinstance(config, schema.SemanticCondConfig) else None


def check_batch(config: schema.CondConfig, batch: Batch) -> None:
    """ValueError, in one sentence, for a batch that `from_batch` would misread or cannot read."""
    name, sizes = name_of(config), {}
    for needed in needs(config):
        instead = kind_of(config).instead.get(needed, needed)
        key = instead if instead in batch else needed
        if key not in batch:
            named = repr(needed) if instead == needed else f"{needed!r} or {instead!r}"
            others = [n for n in batch if n not in needs(config)]
            close = [n for k in (instead, needed) for n in difflib.get_close_matches(k, others, 1)]
            raise ValueError(
                f"the batch has no {named}, which a model conditioned on a {name} needs"
                + (f"; is {close[0]!r} meant as that?" if close else "")
                + f" (it has {', '.join(batch) or 'nothing'})"
            )
        value = batch[key]
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            kind = type(value).__name__
            raise ValueError(f"batch[{key!r}] is a {kind}: give an array, as of numpy.asarray")
        if not value.shape:
            raise ValueError(f"batch[{key!r}] is one number: give an array with one for each image")
        sizes[key] = value.shape[0]
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{n} of {key!r}" for key, n in sizes.items())
        raise ValueError(f"the batch is of different numbers of images: {counts}")
    kind_of(config).check_values(config, batch)


def from_batch(
    config: schema.CondConfig,
    cond_stage: Any,
    params: dict,
    batch: Batch,
    encode: Encode | None = None,
    dropped: Dropped = False,
) -> Cond:
    """Condition of every example; where `dropped` ([B] bool or one bool), the null condition.

    For each kind of `config`, the arrays read from `batch`, and after the semicolon the null
    condition:
    class: `label` [B] int; id num_classes.
    text, layout: `tokens` [B, L] int; `null_tokens` [B, L], the empty or a negative prompt.
    embedding: `embedding` [B, l, c]; zeros, or `null_embedding` [B, l, c].
    inpaint: `image` [B, H, W, c] in [-1, 1], `mask` [B, H, W, 1], 1 where it is drawn; zeros.
    superres: `image`, made small here, or `low_res` [B, h, w, c] as large as the latent; zeros.
    semantic: `segmentation` [B, H, W] int; zeros.
    depth: `depth` [B, h, w, 1] as large as the latent, in any unit; zeros.
    upscale: `low_res` [B, h, w, c] in [-1, 1], `noise_level` [B] int, `low_res_noise` [B, h, w, c]
    unit normal; zeros, with the same label.
    hybrid: text and an image; the null text with the same image.
    """
    return kind_of(config).from_batch(config, cond_stage, params, batch, encode, dropped)


def null_like(
    config: schema.CondConfig,
    cond_stage: Any,
    params: dict,
    batch: Batch,
    encode: Encode | None = None,
) -> Cond:
    """The null condition for the examples of `batch`."""
    return from_batch(config, cond_stage, params, batch, encode, dropped=True)
