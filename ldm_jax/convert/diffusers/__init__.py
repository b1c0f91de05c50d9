"""Models in folders of diffusers."""

from ldm_jax.convert.diffusers.folder import (
    first_stage_scale,
    first_stage_size,
    is_first_stage,
    load,
    load_first_stage,
    load_text_encoder,
    load_unet,
    sole_variant,
)
from ldm_jax.convert.diffusers.writer import save

__all__ = [
    "first_stage_scale",
    "first_stage_size",
    "is_first_stage",
    "load",
    "load_first_stage",
    "load_text_encoder",
    "load_unet",
    "save",
    "sole_variant",
]
