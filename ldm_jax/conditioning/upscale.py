"""A noised low-resolution image beside the latent; its noise level is the label (x4 upscaler)."""

from typing import Any

import jax.numpy as jnp

from ldm_jax import diffusion, schema
from ldm_jax.conditioning import superres
from ldm_jax.conditioning.kind import Batch, Cond, Dropped, Encode, Example, Kind, Sizes, concat

Config = schema.UpscaleCondConfig


def _example(config: Config, sizes: Sizes) -> dict[str, Example]:
    small = Example((*sizes.latent[:2], sizes.image[2]), jnp.float32)
    return {"low_res": small, "low_res_noise": small, "noise_level": Example((), jnp.int32)}


def _from_batch(
    config: Config, module: Any, params: dict, batch: Batch, encode: Encode | None, dropped: Dropped
) -> Cond:
    schedule = diffusion.make_schedule(
        config.schedule, beta_start=config.beta_start, beta_end=config.beta_end
    )
    level = batch["noise_level"]
    noised = diffusion.q_sample(schedule, batch["low_res"], level, batch["low_res_noise"])
    return concat(noised, dropped, level)


def _check(
    config: Config, unet: schema.UNetConfig, first_stage: schema.FirstStageModelConfig, at: str
) -> None:
    superres.check_factor(config, unet, first_stage, at)
    ids = unet.num_classes
    if ids is None or ids <= config.max_noise_level:
        raise ValueError(
            f"unet.num_classes is {ids}: its label is the noise level, and"
            f" {at}.max_noise_level is {config.max_noise_level}; set it to more than that"
        )


KIND = Kind(
    name=lambda config: "noised low-resolution image",
    sampled_by=lambda config: "superres --images PICTURE",
    example=_example,
    from_batch=_from_batch,
    concat_channels=lambda config, latent, image: image,
    label_ids=lambda config: config.max_noise_level + 1,
    check=_check,
)
