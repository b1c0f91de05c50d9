"""A batch into what the UNet is conditioned on, and the null condition that guidance needs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax import schema
from ldm_jax.models import embedders

Encode = Callable[[jax.Array], jax.Array]  # image_bhwc -> scaled latent, the posterior's mode


class Cond(NamedTuple):
    """Conditioning of a batch; a kind that a model does not use is None."""

    context: Any = None
    """[B, l, c] tokens for cross-attention."""
    concat: Any = None
    """[B, h, w, c] channels beside the noised latent."""
    label: Any = None
    """[B] class ids or [B, v] vectors added to the time embedding."""


def build(config: schema.CondConfig, dtype: Any = jnp.float32) -> Any:
    """The module with the learned part of a conditioning, or None if nothing of it is learned."""
    match config:
        case schema.ClassCondConfig(via="context"):
            return embedders.ClassEmbedder(config.num_classes + 1, config.embed_dim, dtype=dtype)
        case schema.SemanticCondConfig() if config.out_channels is not None:
            return embedders.SpatialRescaler(
                config.num_classes, config.stages, config.out_channels, dtype=dtype
            )
    return None


def concat_channels(config: schema.CondConfig, latent_channels: int, image_channels: int) -> int:
    """Channels that concat conditioning adds to the latent's."""
    match config:
        case schema.InpaintCondConfig():
            return latent_channels + 1
        case schema.SuperResCondConfig():
            return image_channels
        case schema.SemanticCondConfig():
            return config.out_channels or config.num_classes
    return 0


def init(config: schema.CondConfig, cond_stage: Any, key: jax.Array) -> dict:
    """Fresh parameters of `build(config)`; {} if it is None."""
    if cond_stage is None:
        return {}
    side = 2**config.stages if isinstance(config, schema.SemanticCondConfig) else None
    example = jnp.zeros((1,) if side is None else (1, side, side), jnp.int32)
    return cond_stage.init(key, example)["params"]


def from_batch(
    config: schema.CondConfig,
    cond_stage: Any,
    params: dict,
    batch: dict[str, jax.Array],
    encode: Encode | None = None,
    dropped: jax.Array | bool = False,
) -> Cond:
    """Condition of every row; where `dropped` ([B] bool or one bool), the null condition.

    Reads `label` [B], or `image` [B, H, W, c] in [-1, 1] and `mask` [B, H, W, 1] (1 = hole), or
    `image`, or `segmentation` [B, H, W], as `config` asks. The null class is id num_classes; the
    null of a concat conditioning is zeros.
    """
    match config:
        case None:
            return Cond()
        case schema.ClassCondConfig():
            label = jnp.where(dropped, config.num_classes, batch["label"])
            if config.via == "label":
                return Cond(label=label)
            return Cond(context=cond_stage.apply({"params": params}, label))
        case schema.InpaintCondConfig():
            concat = masked_image(config, batch["image"], batch["mask"], encode)
        case schema.SuperResCondConfig():
            concat = downsample(batch["image"], config.factor)
        case schema.SemanticCondConfig():
            module = cond_stage or embedders.SpatialRescaler(
                config.num_classes, config.stages, None
            )
            concat = module.apply({"params": params}, batch["segmentation"])
    keep = jnp.logical_not(jnp.broadcast_to(dropped, concat.shape[:1]))[:, None, None, None]
    return Cond(concat=jnp.where(keep, concat, 0))


def null_like(
    config: schema.CondConfig,
    cond_stage: Any,
    params: dict,
    batch: dict[str, jax.Array],
    encode: Encode | None = None,
) -> Cond:
    """The null condition for as many rows as `batch` has."""
    return from_batch(config, cond_stage, params, batch, encode, dropped=True)


def masked_image(
    config: schema.InpaintCondConfig, image: jax.Array, mask: jax.Array, encode: Encode
) -> jax.Array:
    """The image encoded with its hole filled, and the mask at the latent's size."""
    latent = encode(jnp.where(mask > 0.5, config.fill, image))
    step = image.shape[1] // latent.shape[1]
    keep, hole = config.mask_range
    # nearest, as torch's interpolate: the upper left pixel of each cell
    small = jnp.where(mask[:, ::step, ::step] > 0.5, hole, keep).astype(latent.dtype)
    parts = (latent, small) if config.order == "image_mask" else (small, latent)
    return jnp.concatenate(parts, axis=-1)


def downsample(image: jax.Array, factor: int) -> jax.Array:
    """The low-resolution image of super-resolution: antialiased bicubic, then clipped."""
    b, h, w, c = image.shape
    small = jax.image.resize(image, (b, h // factor, w // factor, c), "cubic", antialias=True)
    return jnp.clip(small, -1, 1)
