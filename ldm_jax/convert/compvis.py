"""Models of CompVis/latent-diffusion and Stable Diffusion: their YAML options and tensor names."""

from collections.abc import Mapping
from typing import Any

import jax

from ldm_jax.convert import rows, table
from ldm_jax.convert.compvis_config import first_stage_config, unet_config
from ldm_jax.models import autoencoder, unet
from ldm_jax.models.autoencoder import FirstStage
from ldm_jax.models.unet import UNet

StateDict = Mapping[str, Any]  # torch name -> NumPy array or ShapeDtypeStruct

UNET_PREFIX = "model.diffusion_model."
FIRST_STAGE_PREFIX = "first_stage_model."


def load_unet(config: Mapping[str, Any], state_dict: StateDict) -> tuple[UNet, dict]:
    """The UNet of a checkpoint, and its parameters.

    config: `unet_config.params` of the YAML.
    state_dict: its tensors, all named with the prefix `model.diffusion_model.` or none; shapes in
        their place give shapes.
    Raises ValueError for an option that is unknown or not supported, and for tensors that do not
    fit. The module computes in float32 on any platform; `clone(dtype=..., attention=...)` changes
    that.
    """
    model = unet.from_config(unet_config(config))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *unet.example_inputs(model))["params"]
    tensors = _without_prefix(state_dict, UNET_PREFIX)
    return model, table.from_torch(rows.unet(model), tensors, shapes)


def unet_state_dict(model: UNet, params: dict) -> dict[str, Any]:
    """Inverse of `load_unet`: CompVis name, without a prefix, -> NumPy array."""
    return table.to_torch(rows.unet(model), params)


def load_first_stage(config: Mapping[str, Any], state_dict: StateDict) -> tuple[FirstStage, dict]:
    """The first stage of a checkpoint, and its parameters; like `load_unet`.

    config: `first_stage_config.params` of the YAML.
    state_dict: its tensors, all named with the prefix `first_stage_model.` or none.
    """
    model = autoencoder.from_config(first_stage_config(config))
    inputs = autoencoder.example_inputs(model)
    # the identity has no parameters at all
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs).get("params", {})
    tensors = _without_prefix(state_dict, FIRST_STAGE_PREFIX)
    return model, table.from_torch(rows.autoencoder(model), tensors, shapes)


def first_stage_state_dict(model: FirstStage, params: dict) -> dict[str, Any]:
    """Inverse of `load_first_stage`: CompVis name, without a prefix, -> NumPy array."""
    return table.to_torch(rows.autoencoder(model), params)


def _without_prefix(state_dict: StateDict, prefix: str) -> StateDict:
    if all(name.startswith(prefix) for name in state_dict):
        return {name.removeprefix(prefix): x for name, x in state_dict.items()}
    return state_dict
