"""The image with its masked part filled, encoded, and the mask: channels beside the latent."""

from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax import schema
from ldm_jax.conditioning.kind import Batch, Cond, Dropped, Encode, Example, Kind, Sizes, concat

Config = schema.InpaintCondConfig


def _example(config: Config, sizes: Sizes) -> dict[str, Example]:
    mask = (*sizes.image[:2], 1)
    return {"image": Example(sizes.image, jnp.float32), "mask": Example(mask, jnp.float32)}


def _from_batch(
    config: Config, module: Any, params: dict, batch: Batch, encode: Encode | None, dropped: Dropped
) -> Cond:
    if encode is None:
        raise ValueError("a masked image is encoded: give from_batch the first stage's `encode`")
    return concat(masked_image(config, batch["image"], batch["mask"], encode), dropped)


def masked_image(config: Config, image: jax.Array, mask: jax.Array, encode: Encode) -> jax.Array:
    """The image encoded with its masked part filled, and the mask at the latent's size."""
    latent = encode(jnp.where(mask > 0.5, config.fill, image))
    step = image.shape[1] // latent.shape[1]
    kept, masked = config.mask_range
    # nearest, as torch's interpolate: the upper left pixel of each cell
    small = jnp.where(mask[:, ::step, ::step] > 0.5, masked, kept).astype(latent.dtype)
    parts = (latent, small) if config.order == "image_mask" else (small, latent)
    return jnp.concatenate(parts, axis=-1)


KIND = Kind(
    name=lambda config: "masked image",
    sampled_by=lambda config: "inpaint --images PICTURE --masks MASK",
    example=_example,
    from_batch=_from_batch,
    concat_channels=lambda config, latent, image: latent + 1,
)
