"""Models in the files of CompVis/latent-diffusion and Stable Diffusion."""

from ldm_jax.convert.compvis.checkpoints import (
    COND_STAGE_PREFIX,
    FIRST_STAGE_PREFIX,
    UNET_PREFIX,
    as_written,
    cond_stage_state_dict,
    first_stage_state_dict,
    load,
    load_cond_stage,
    load_first_stage,
    load_first_stage_file,
    load_unet,
    model_entries,
    model_shapes,
    save,
    unet_state_dict,
    yaml_text,
)

__all__ = [
    "COND_STAGE_PREFIX",
    "FIRST_STAGE_PREFIX",
    "UNET_PREFIX",
    "as_written",
    "cond_stage_state_dict",
    "first_stage_state_dict",
    "load",
    "load_cond_stage",
    "load_first_stage",
    "load_first_stage_file",
    "load_unet",
    "model_entries",
    "model_shapes",
    "save",
    "unet_state_dict",
    "yaml_text",
]
