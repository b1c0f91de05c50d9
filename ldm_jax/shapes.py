"""Shapes of the parameters that a config asks for, without computing anything."""

import functools

from ldm_jax import conditioning, schema
from ldm_jax.convert import compvis
from ldm_jax.models import autoencoder
from ldm_jax.models import unet as unet_module


@functools.lru_cache(16)
def unet(config: schema.UNetConfig) -> dict:
    """Shapes of a UNet's parameters."""
    return compvis.unet_shapes(unet_module.from_config(config))


@functools.lru_cache(16)
def first_stage(config: schema.FirstStageModelConfig) -> dict:
    """Shapes of a first stage's parameters; {} for the identity."""
    return compvis.first_stage_shapes(autoencoder.from_config(config))


@functools.lru_cache(16)
def cond(config: schema.CondConfig) -> dict:
    """Shapes of the learned part of a conditioning; {} if nothing of it is learned."""
    return compvis.cond_shapes(config, conditioning.build(config))
