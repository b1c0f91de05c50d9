"""One part of a checkpoint: names with that part's prefix on all of them or on none."""

from collections.abc import Mapping
from typing import Any

import jax

from ldm_jax import conditioning, schema
from ldm_jax.convert import table, text_tables
from ldm_jax.convert.compvis import conditions, spellings, tables
from ldm_jax.convert.compvis.selection import (
    COND_STAGE_PREFIX,
    FIRST_STAGE_PREFIX,
    UNET_PREFIX,
    StateDict,
    ignored,
)
from ldm_jax.convert.compvis.yaml_options import first_stage_config, unet_config
from ldm_jax.models import autoencoder, unet
from ldm_jax.models.autoencoder import FirstStage
from ldm_jax.models.unet import UNet


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
    tensors = _without_prefix(state_dict, UNET_PREFIX)
    return model, table.from_torch(tables.unet(model), tensors, unet_shapes(model))


def unet_state_dict(model: UNet, params: dict) -> dict[str, Any]:
    """Inverse of `load_unet`: CompVis name, without a prefix, -> NumPy array."""
    return table.to_torch(tables.unet(model), params)


def load_first_stage(config: Mapping[str, Any], state_dict: StateDict) -> tuple[FirstStage, dict]:
    """The first stage of a checkpoint, and its parameters; like `load_unet`.

    config: `first_stage_config.params` of the YAML.
    state_dict: its tensors, all named with the prefix `first_stage_model.` or none.
    """
    model = autoencoder.from_config(first_stage_config(config))
    tensors, _ = spellings.common(_without_prefix(state_dict, FIRST_STAGE_PREFIX))
    return model, table.from_torch(tables.autoencoder(model), tensors, first_stage_shapes(model))


def first_stage_state_dict(model: FirstStage, params: dict) -> dict[str, Any]:
    """Inverse of `load_first_stage`: CompVis name, without a prefix, -> NumPy array."""
    return table.to_torch(tables.autoencoder(model), params)


def load_cond_stage(
    target: str, config: Mapping[str, Any], state_dict: StateDict
) -> tuple[Any, dict]:
    """The conditioning stage of a checkpoint, and its parameters; like `load_unet`.

    target: `cond_stage_config.target` of the YAML, or all of `cond_stage_config` if it is a string.
    config: its `params`.
    state_dict: its tensors, all named with the prefix `cond_stage_model.` or none.
    (None, {}) for a stage without parameters of its own.
    """
    name, tensors = target.rpartition(".")[2], _without_prefix(state_dict, COND_STAGE_PREFIX)
    if name in ("Identity", conditions.IS_FIRST_STAGE, conditions.IS_UNCONDITIONAL):
        return None, table.from_torch([], tensors, {})
    shapes = {COND_STAGE_PREFIX + key: tuple(x.shape) for key, x in tensors.items()}
    cond = conditions.cond_stage_config(name, config, shapes)
    model = conditioning.build(cond)
    tensors = {key: x for key, x in tensors.items() if not ignored(COND_STAGE_PREFIX + key)}
    params = table.from_torch(text_tables.cond_stage(cond), tensors, cond_shapes(cond, model))
    return model, params


def cond_stage_state_dict(config: schema.CondConfig, params: dict) -> dict[str, Any]:
    """Inverse of `load_cond_stage`: CompVis name, without a prefix, -> NumPy array."""
    return table.to_torch(text_tables.cond_stage(config), params)


def _without_prefix(state_dict: StateDict, prefix: str) -> StateDict:
    if all(name.startswith(prefix) for name in state_dict):
        return {name.removeprefix(prefix): x for name, x in state_dict.items()}
    return state_dict


def unet_shapes(model: UNet) -> dict:
    """Shapes of the parameters of a UNet."""
    return jax.eval_shape(model.init, jax.random.key(0), *unet.example_inputs(model))["params"]


def first_stage_shapes(model: FirstStage) -> dict:
    """Shapes of the parameters of a first stage."""
    inputs = autoencoder.example_inputs(model)
    # the identity has no parameters at all
    return jax.eval_shape(model.init, jax.random.key(0), *inputs).get("params", {})


def cond_shapes(cond: schema.CondConfig, model: Any) -> dict:
    """Shapes of the parameters of a conditioning stage."""
    return jax.eval_shape(lambda key: conditioning.init(cond, model, key), jax.random.key(0))
