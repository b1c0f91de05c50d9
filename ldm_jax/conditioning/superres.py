"""The low-resolution image, as large as the latent: channels beside it (`bsr_sr`)."""

from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax import schema
from ldm_jax.conditioning.kind import Batch, Cond, Dropped, Encode, Example, Kind, Sizes, concat

Config = schema.SuperResCondConfig


def _example(config: Config, sizes: Sizes) -> dict[str, Example]:
    return {"image": Example(sizes.image, jnp.float32)}


def _from_batch(
    config: Config, module: Any, params: dict, batch: Batch, encode: Encode | None, dropped: Dropped
) -> Cond:
    small = batch["low_res"] if "low_res" in batch else downsample(batch["image"], config.factor)
    return concat(small, dropped)


def downsample(image: jax.Array, factor: int) -> jax.Array:
    """The low-resolution image of super-resolution: antialiased bicubic, then clipped."""
    b, h, w, c = image.shape
    small = jax.image.resize(image, (b, h // factor, w // factor, c), "cubic", antialias=True)
    return jnp.clip(small, -1, 1)


def check_factor(
    config: Any, unet: schema.UNetConfig, first_stage: schema.FirstStageModelConfig, at: str
) -> None:
    """ValueError unless `config.factor` makes the image as small as the latent."""
    down = first_stage.downsample
    if config.factor != down:
        raise ValueError(
            f"{at}.factor is {config.factor}, but the first stage downsamples by {down}:"
            " the low-resolution image must be as large as the latent"
        )


KIND = Kind(
    name=lambda config: "low-resolution image",
    sampled_by=lambda config: "superres --images PICTURE",
    example=_example,
    from_batch=_from_batch,
    concat_channels=lambda config, latent, image: image,
    check=check_factor,
    instead={"image": "low_res"},
)
