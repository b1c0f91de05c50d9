"""A batch into what the UNet is conditioned on, and the null condition that guidance needs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax import diffusion, schema
from ldm_jax.models import bert, clip, embedders

Encode = Callable[[jax.Array], jax.Array]  # image_bhwc -> scaled latent, the posterior's mode


class Cond(NamedTuple):
    """Conditioning of a batch; a kind that a model does not use is None."""

    context: Any = None
    """[B, l, c] tokens for cross-attention."""
    concat: Any = None
    """[B, h, w, c] channels beside the noised latent."""
    label: Any = None
    """[B] class ids or [B, v] vectors added to the time embedding."""
    kv_cache: Any = None
    """Keys and values that a UNet's layers make of `context`, [B, ...] arrays: `bundle.project`."""


def build(config: schema.CondConfig, dtype: Any = jnp.float32, remat: bool = False) -> Any:
    """The module with the learned part of a conditioning, or None if nothing of it is learned.

    `remat` recomputes the layers of a text encoder that trains in the backward pass.
    """
    match config:
        case schema.ClassCondConfig(via="context"):
            ids = config.num_classes + config.null_class
            return embedders.ClassEmbedder(ids, config.embed_dim, dtype=dtype)
        case schema.SemanticCondConfig() if config.out_channels is not None:
            return embedders.SpatialRescaler(
                config.num_classes, config.stages, config.out_channels, dtype=dtype
            )
        case schema.TextCondConfig(encoder=schema.CLIPTextConfig()):
            return clip.text_from_config(config.encoder, dtype=dtype)
        case schema.TextCondConfig() | schema.LayoutCondConfig():
            return bert.from_config(config.encoder, dtype=dtype, remat=remat)
        case schema.HybridCondConfig():
            return build(config.text, dtype, remat)
    return None


def concat_channels(config: schema.CondConfig, latent_channels: int, image_channels: int) -> int:
    """Channels that concat conditioning adds to the latent's."""
    match config:
        case schema.InpaintCondConfig():
            return latent_channels + 1
        case schema.SuperResCondConfig() | schema.UpscaleCondConfig():
            return image_channels
        case schema.SemanticCondConfig():
            return config.out_channels or config.num_classes
        case schema.DepthCondConfig():
            return 1
        case schema.HybridCondConfig():
            return concat_channels(config.concat, latent_channels, image_channels)
    return 0


def context_width(config: schema.CondConfig) -> tuple[str, int] | None:
    """Field and value of the width of the context tokens; None without any."""
    match config:
        case schema.ClassCondConfig(via="context"):
            return "cond.embed_dim", config.embed_dim
        case schema.TextCondConfig() | schema.LayoutCondConfig():
            return "cond.encoder.width", config.encoder.width
        case schema.EmbeddingCondConfig():
            return "cond.width", config.width
        case schema.HybridCondConfig():
            return "cond.text.encoder.width", config.text.encoder.width
    return None


def init(config: schema.CondConfig, cond_stage: Any, key: jax.Array) -> dict:
    """Fresh parameters of `build(config)`; {} if it is None."""
    if cond_stage is None:
        return {}
    match config:
        case schema.SemanticCondConfig():
            shape = (1, 2**config.stages, 2**config.stages)
        case schema.TextCondConfig() | schema.LayoutCondConfig():
            shape = (1, config.encoder.max_length)
        case schema.HybridCondConfig():
            shape = (1, config.text.encoder.max_length)
        case _:
            shape = (1,)
    return cond_stage.init(key, jnp.zeros(shape, jnp.int32))["params"]


def from_batch(
    config: schema.CondConfig,
    cond_stage: Any,
    params: dict,
    batch: dict[str, jax.Array],
    encode: Encode | None = None,
    dropped: jax.Array | bool = False,
) -> Cond:
    """Condition of every row; where `dropped` ([B] bool or one bool), the null condition.

    Reads from `batch`, by the kind of `config`, what stands left; right is its null condition:
    class: `label` [B] int; id num_classes.
    text, layout: `tokens` [B, L] int; `null_tokens` [B, L], the empty or a negative prompt.
    embedding: `embedding` [B, l, c]; zeros, or `null_embedding` [B, l, c].
    inpaint: `image` [B, H, W, c] in [-1, 1], `mask` [B, H, W, 1], 1 = hole; zeros.
    superres: `image`, made small here, or `low_res` [B, h, w, c] as large as the latent; zeros.
    semantic: `segmentation` [B, H, W] int; zeros.
    depth: `depth` [B, h, w, 1] as large as the latent, in any unit; zeros.
    upscale: `low_res` [B, h, w, c] in [-1, 1], `noise_level` [B] int, `low_res_noise` [B, h, w, c]
    unit normal; zeros, with the same label.
    hybrid: text and an image; the null text with the same image.
    """
    match config:
        case None:
            return Cond()
        case schema.ClassCondConfig():
            label = batch["label"]
            if config.null_class:
                label = jnp.where(dropped, config.num_classes, label)
            elif dropped is True:
                raise ValueError("the model has no null class: sample with guidance scale 1")
            if config.via == "label":
                return Cond(label=label)
            return Cond(context=cond_stage.apply({"params": params}, label))
        case schema.TextCondConfig() | schema.LayoutCondConfig():
            return Cond(context=cond_stage.apply({"params": params}, tokens(batch, dropped)))
        case schema.EmbeddingCondConfig():
            given = batch["embedding"]
            null = batch.get("null_embedding", jnp.zeros_like(given))
            return Cond(context=_where(dropped, null, given))
        case schema.HybridCondConfig():
            text = from_batch(config.text, cond_stage, params, batch, encode, dropped)
            beside = from_batch(config.concat, None, {}, batch, encode)
            return beside._replace(context=text.context)
    label = batch["noise_level"] if isinstance(config, schema.UpscaleCondConfig) else None
    concat = _concat(config, cond_stage, params, batch, encode)
    return Cond(concat=_zero_where(dropped, concat), label=label)


def null_like(
    config: schema.CondConfig,
    cond_stage: Any,
    params: dict,
    batch: dict[str, jax.Array],
    encode: Encode | None = None,
) -> Cond:
    """The null condition for as many rows as `batch` has."""
    return from_batch(config, cond_stage, params, batch, encode, dropped=True)


def tokens(batch: dict[str, jax.Array], dropped: jax.Array | bool) -> jax.Array:
    """Token ids [B, L]: `null_tokens` of the batch where `dropped`, else its `tokens`."""
    if isinstance(dropped, bool):  # and the others may be absent
        return batch["null_tokens" if dropped else "tokens"]
    return jnp.where(dropped[:, None], batch["null_tokens"], batch["tokens"])


def _zero_where(dropped: jax.Array | bool, x: jax.Array) -> jax.Array:
    return _where(dropped, jnp.zeros_like(x), x)


def _where(rows: jax.Array | bool, x: jax.Array, y: jax.Array) -> jax.Array:
    """The rows of x where `rows` ([B] bool or one bool), the others of y."""
    rows = jnp.broadcast_to(rows, x.shape[:1])
    return jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), x, y)


def _concat(
    config: schema.CondConfig, cond_stage: Any, params: dict, batch: dict, encode: Encode | None
) -> jax.Array:
    match config:
        case schema.InpaintCondConfig():
            return masked_image(config, batch["image"], batch["mask"], encode)
        case schema.SuperResCondConfig():
            if "low_res" in batch:
                return batch["low_res"]
            return downsample(batch["image"], config.factor)
        case schema.SemanticCondConfig():
            module = cond_stage or embedders.SpatialRescaler(
                config.num_classes, config.stages, None
            )
            return module.apply({"params": params}, batch["segmentation"])
        case schema.DepthCondConfig():
            return scaled_depth(batch["depth"])
        case schema.UpscaleCondConfig():
            schedule = diffusion.make_schedule(
                config.schedule, beta_start=config.beta_start, beta_end=config.beta_end
            )
            names = ("low_res", "noise_level", "low_res_noise")
            return diffusion.q_sample(schedule, *(batch[name] for name in names))
    raise TypeError(f"{type(config).__name__} is no concat conditioning")


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


def scaled_depth(depth: jax.Array) -> jax.Array:
    """Depth [B, h, w, 1] moved to [-1, 1], per image; -1 where it is the same everywhere."""
    low, high = (f(depth, axis=(1, 2, 3), keepdims=True) for f in (jnp.min, jnp.max))
    # the reference adds 0.001 to the range, which only matters where there is none
    return 2 * (depth - low) / jnp.maximum(high - low, 0.001) - 1
