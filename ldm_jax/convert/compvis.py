"""Models of CompVis/latent-diffusion and Stable Diffusion: their YAML options and tensor names."""

from collections.abc import Mapping
from typing import Any

import jax

from ldm_jax import schema
from ldm_jax.convert import rows, table
from ldm_jax.models import autoencoder, unet
from ldm_jax.models.autoencoder import AutoencoderKL
from ldm_jax.models.unet import UNet

StateDict = Mapping[str, Any]  # torch name -> NumPy array or ShapeDtypeStruct

UNET_PREFIX = "model.diffusion_model."
FIRST_STAGE_PREFIX = "first_stage_model."

# Options that do not change what the model computes.
UNET_IGNORED = ("image_size", "legacy", "use_checkpoint", "use_fp16")
FIRST_STAGE_IGNORED = ("ckpt_path", "ignore_keys", "image_key", "lossconfig", "monitor")

# Options with one value that any published model uses: any other is refused.
UNET_FIXED = {
    "conv_resample": True,
    "dims": 2,
    "disable_middle_self_attn": False,
    "disable_self_attentions": None,
    "n_embed": None,
    "num_attention_blocks": None,
    "num_heads_upsample": -1,
    "use_new_attention_order": False,
}
DDCONFIG_FIXED = {
    "double_z": True,
    "give_pre_end": False,
    "resamp_with_conv": True,
    "tanh_out": False,
    "use_linear_attn": False,
}


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


def load_first_stage(
    config: Mapping[str, Any], state_dict: StateDict
) -> tuple[AutoencoderKL, dict]:
    """The first stage of a checkpoint, and its parameters; like `load_unet`.

    config: `first_stage_config.params` of the YAML.
    state_dict: its tensors, all named with the prefix `first_stage_model.` or none.
    """
    model = autoencoder.from_config(first_stage_config(config))
    inputs = autoencoder.example_inputs(model)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    tensors = _without_prefix(state_dict, FIRST_STAGE_PREFIX)
    return model, table.from_torch(rows.autoencoder(model), tensors, shapes)


def first_stage_state_dict(model: AutoencoderKL, params: dict) -> dict[str, Any]:
    """Inverse of `load_first_stage`: CompVis name, without a prefix, -> NumPy array."""
    return table.to_torch(rows.autoencoder(model), params)


def unet_config(config: Mapping[str, Any]) -> schema.UNetConfig:
    """`unet_config.params` of the YAML in our terms. ValueError names what cannot be translated."""
    values = _read(
        config,
        "unet_config",
        required=(
            "in_channels",
            "out_channels",
            "model_channels",
            "num_res_blocks",
            "attention_resolutions",
        ),
        optional={
            "channel_mult": (1, 2, 4, 8),
            "num_heads": -1,
            "num_head_channels": -1,
            "use_spatial_transformer": False,
            "transformer_depth": 1,
            "context_dim": None,
            "use_linear_in_transformer": False,
            "use_scale_shift_norm": False,
            "resblock_updown": False,
            "num_classes": None,
            "adm_in_channels": None,
            "dropout": 0.0,
        },
        fixed=UNET_FIXED,
        ignored=UNET_IGNORED,
    )
    classes, vector_dim = values["num_classes"], values["adm_in_channels"]
    if isinstance(classes, str) and classes != "sequential":
        raise ValueError(f"unet_config: num_classes={classes!r} is not supported")
    if classes == "sequential" and vector_dim is None:
        raise ValueError("unet_config: num_classes='sequential' needs adm_in_channels")
    if classes != "sequential" and vector_dim is not None:
        raise ValueError(
            f"unet_config: adm_in_channels={vector_dim} needs num_classes='sequential'"
        )
    heads, head_channels = _given(values["num_heads"]), _given(values["num_head_channels"])
    return schema.UNetConfig(
        in_channels=values["in_channels"],
        out_channels=values["out_channels"],
        model_channels=values["model_channels"],
        channel_mult=tuple(values["channel_mult"]),
        num_res_blocks=_same(values["num_res_blocks"]),
        attention_downsample=tuple(values["attention_resolutions"]),
        num_heads=heads if head_channels is None else None,  # the reference ignores it then
        num_head_channels=head_channels,
        spatial_transformer=values["use_spatial_transformer"],
        transformer_depth=_same(values["transformer_depth"]),
        context_dim=_same(values["context_dim"]),
        linear_projection=values["use_linear_in_transformer"],
        scale_shift_norm=values["use_scale_shift_norm"],
        resblock_updown=values["resblock_updown"],
        num_classes=None if classes == "sequential" else classes,
        vector_dim=vector_dim,
        dropout=values["dropout"],
    )


def first_stage_config(config: Mapping[str, Any]) -> schema.AutoencoderKLConfig:
    """`first_stage_config.params` of the YAML in our terms. ValueError as in `unet_config`."""
    if "n_embed" in config:
        raise ValueError(
            f"first_stage_config: n_embed={config['n_embed']} is a vector-quantized first stage,"
            " which is not supported; choose a model with a KL first stage"
        )
    outer = _read(
        config,
        "first_stage_config",
        required=("embed_dim", "ddconfig"),
        optional={},
        fixed={"colorize_nlabels": None},
        ignored=FIRST_STAGE_IGNORED,
    )
    values = _read(
        outer["ddconfig"],
        "ddconfig",
        required=(
            "z_channels",
            "resolution",
            "in_channels",
            "out_ch",
            "ch",
            "ch_mult",
            "num_res_blocks",
            "attn_resolutions",
        ),
        optional={"attn_type": "vanilla", "dropout": 0.0},
        fixed=DDCONFIG_FIXED,
        ignored=(),
    )
    if values["attn_type"] not in ("vanilla", "none"):
        raise ValueError(f"ddconfig: attn_type={values['attn_type']!r} is not supported")
    attends = values["attn_type"] == "vanilla"
    resolutions = values["attn_resolutions"] if attends else ()
    return schema.AutoencoderKLConfig(
        in_channels=values["in_channels"],
        out_channels=values["out_ch"],
        channels=values["ch"],
        channel_mult=tuple(values["ch_mult"]),
        num_res_blocks=values["num_res_blocks"],
        attention_downsample=tuple(values["resolution"] // size for size in resolutions),
        mid_attention=attends,
        z_channels=values["z_channels"],
        embed_dim=outer["embed_dim"],
        dropout=values["dropout"],
    )


def _without_prefix(state_dict: StateDict, prefix: str) -> StateDict:
    if all(name.startswith(prefix) for name in state_dict):
        return {name.removeprefix(prefix): x for name, x in state_dict.items()}
    return state_dict


def _read(
    config: Mapping[str, Any],
    where: str,
    *,
    required: tuple[str, ...],
    optional: dict[str, Any],
    fixed: dict[str, Any],
    ignored: tuple[str, ...],
) -> dict[str, Any]:
    """The required and optional values; ValueError for a missing key or one not listed here."""
    missing = [key for key in required if key not in config]
    unknown = sorted(set(config) - {*required, *optional, *fixed, *ignored})
    changed = [f"{k}={config[k]!r}" for k, v in fixed.items() if k in config and config[k] != v]
    for what, keys in (("missing", missing), ("unknown", unknown), ("not supported", changed)):
        if keys:
            raise ValueError(f"{where}: {what}: {', '.join(keys)}")
    return {**optional, **{k: config[k] for k in (*required, *optional) if k in config}}


def _given(value: int) -> int | None:
    """The reference writes -1 for none."""
    return None if value == -1 else value


def _same(value):
    """Stable Diffusion 2 may write one value per level; ValueError unless they are all equal."""
    if not isinstance(value, (list, tuple)):
        return value
    if len(set(value)) != 1:
        raise ValueError(f"unet_config: {list(value)}: one value for all levels is supported")
    return value[0]
