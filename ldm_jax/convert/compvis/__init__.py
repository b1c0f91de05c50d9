"""Models in the files of CompVis/latent-diffusion and Stable Diffusion."""

from ldm_jax.convert.compvis.checkpoints import (
    as_written,
    load,
    model_entries,
    model_shapes,
    save,
    yaml_text,
)
from ldm_jax.convert.compvis.first_stage_files import load_first_stage_file
from ldm_jax.convert.compvis.parts import (
    cond_shapes,
    cond_stage_state_dict,
    first_stage_shapes,
    first_stage_state_dict,
    load_cond_stage,
    load_first_stage,
    load_unet,
    unet_shapes,
    unet_state_dict,
)
from ldm_jax.convert.compvis.selection import COND_STAGE_PREFIX, FIRST_STAGE_PREFIX, UNET_PREFIX

__all__ = [
    "COND_STAGE_PREFIX",
    "FIRST_STAGE_PREFIX",
    "UNET_PREFIX",
    "as_written",
    "cond_shapes",
    "cond_stage_state_dict",
    "first_stage_shapes",
    "first_stage_state_dict",
    "load",
    "load_cond_stage",
    "load_first_stage",
    "load_first_stage_file",
    "load_unet",
    "model_entries",
    "model_shapes",
    "save",
    "unet_shapes",
    "unet_state_dict",
    "yaml_text",
]
