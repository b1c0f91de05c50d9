"""YAML options of CompVis UNets and first stages in our terms, and back.

Options are the `params` of `unet_config` and `first_stage_config` in the files of
CompVis/latent-diffusion and Stable Diffusion 1 and 2.
"""

from collections.abc import Mapping
from typing import Any

from ldm_jax import schema

# Options without an effect on the model's output.
UNET_IGNORED = ("image_size", "legacy", "use_checkpoint", "use_fp16")
FIRST_STAGE_IGNORED = ("ckpt_path", "ignore_keys", "image_key", "lossconfig", "monitor")
KL_IGNORED = ("ema_decay", "learn_logvar")
VQ_IGNORED = ("lr_g_factor", "scheduler_config", "use_ema")
IDENTITY_IGNORED = ("vq_interface",)

# Options with one value that any published model uses: any other is refused.
UNET_FIXED = {
    "conv_resample": True,
    "dims": 2,
    "disable_middle_self_attn": False,
    "n_embed": None,
    "num_attention_blocks": None,
    "num_heads_upsample": -1,
    "use_new_attention_order": False,
}
VQ_FIXED = {"batch_resize_range": None, "remap": None, "sane_index_shape": False}
DDCONFIG_FIXED = {
    "give_pre_end": False,
    "resamp_with_conv": True,
    "tanh_out": False,
    "use_linear_attn": False,
}

# Defaults of options that may be left out.
UNET_DEFAULTS = {
    "channel_mult": [1, 2, 4, 8],
    "num_heads": -1,
    "num_head_channels": -1,
    "use_spatial_transformer": False,
    "transformer_depth": 1,
    "context_dim": None,
    "disable_self_attentions": None,
    "use_linear_in_transformer": False,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "num_classes": None,
    "adm_in_channels": None,
    "dropout": 0.0,
}
DDCONFIG_DEFAULTS = {"attn_type": "vanilla", "dropout": 0.0}

RESOLUTION = 256
"""Side of a training image of every published first stage: its levels are named by their side."""


def unet_config(options: Mapping[str, Any]) -> schema.UNetConfig:
    """`unet_config.params` of the YAML in our terms. ValueError names what cannot be translated.

    The YAML has no option for attention in float32: `upcast_attention` is False.
    """
    values = read(
        options,
        "unet_config",
        required=(
            "in_channels",
            "out_channels",
            "model_channels",
            "num_res_blocks",
            "attention_resolutions",
        ),
        optional=UNET_DEFAULTS,
        fixed=UNET_FIXED,
        ignored=UNET_IGNORED,
    )
    classes, vector_dim = _labels(values["num_classes"], values["adm_in_channels"])
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
        only_cross_attention=tuple(values["disable_self_attentions"] or ()),
        linear_projection=values["use_linear_in_transformer"],
        scale_shift_norm=values["use_scale_shift_norm"],
        resblock_updown=values["resblock_updown"],
        num_classes=classes,
        vector_dim=vector_dim,
        dropout=values["dropout"],
    )


def unet_options(config: schema.UNetConfig, image_size: int) -> dict[str, Any]:
    """Inverse of `unet_config`, without options that have their default.

    image_size: side of the latent of a training image, which the reference asks for.
    ValueError where the heads of the levels are no option of the reference. `upcast_attention` is
    none either (an environment variable there) and is left out.
    """
    heads, head_channels = config.num_heads, config.num_head_channels
    if isinstance(heads, tuple):
        heads, head_channels = None, _head_channels(config)
    values = {
        "channel_mult": list(config.channel_mult),
        "num_heads": -1 if heads is None else heads,
        "num_head_channels": -1 if head_channels is None else head_channels,
        "use_spatial_transformer": config.spatial_transformer,
        "transformer_depth": config.transformer_depth,
        "context_dim": config.context_dim if config.spatial_transformer else None,
        "disable_self_attentions": list(config.only_cross_attention) or None,
        "use_linear_in_transformer": config.linear_projection,
        "use_scale_shift_norm": config.scale_shift_norm,
        "resblock_updown": config.resblock_updown,
        "num_classes": config.num_classes if config.vector_dim is None else "sequential",
        "adm_in_channels": config.vector_dim,
        "dropout": config.dropout,
    }
    return {
        "image_size": image_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "model_channels": config.model_channels,
        "num_res_blocks": config.num_res_blocks,
        "attention_resolutions": list(config.attention_downsample),
        **{name: x for name, x in values.items() if x != UNET_DEFAULTS[name]},
    }


def first_stage_config(
    options: Mapping[str, Any], channels: int = 3
) -> schema.FirstStageModelConfig:
    """`first_stage_config.params` of the YAML in our terms. ValueError as in `unet_config`.

    Vector-quantized with `n_embed`, else KL; the identity with neither `embed_dim` nor `ddconfig`,
    and then `channels` are the image's, which are not in the YAML.
    """
    if "embed_dim" not in options and "ddconfig" not in options:
        ignored = (*FIRST_STAGE_IGNORED, *IDENTITY_IGNORED)
        read(options, "first_stage_config", required=(), optional={}, fixed={}, ignored=ignored)
        return schema.IdentityFirstStageConfig(channels)
    quantized = "n_embed" in options
    outer = read(
        options,
        "first_stage_config",
        required=("embed_dim", "ddconfig", *(("n_embed",) if quantized else ())),
        optional={},
        fixed={"colorize_nlabels": None, **(VQ_FIXED if quantized else {})},
        ignored=(*FIRST_STAGE_IGNORED, *(VQ_IGNORED if quantized else KL_IGNORED)),
    )
    fields = _ddconfig(outer["ddconfig"], double_z=not quantized) | {
        "embed_dim": outer["embed_dim"]
    }
    if quantized:
        return schema.AutoencoderVQConfig(**fields, num_codes=outer["n_embed"])
    return schema.AutoencoderKLConfig(**fields)


def _ddconfig(options: Mapping[str, Any], double_z: bool) -> dict[str, Any]:
    """Fields that KL and VQ share."""
    values = read(
        options,
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
        optional=DDCONFIG_DEFAULTS,
        fixed={**DDCONFIG_FIXED, "double_z": double_z},
        ignored=(),
    )
    # "vanilla-xformers" of Stable Diffusion 2 computes the same
    if values["attn_type"] not in ("vanilla", "vanilla-xformers", "none"):
        raise ValueError(f"ddconfig: attn_type={values['attn_type']!r} is not supported")
    attends = values["attn_type"] != "none"
    resolutions = values["attn_resolutions"] if attends else ()
    return {
        "in_channels": values["in_channels"],
        "out_channels": values["out_ch"],
        "channels": values["ch"],
        "channel_mult": tuple(values["ch_mult"]),
        "num_res_blocks": values["num_res_blocks"],
        "attention_downsample": tuple(values["resolution"] // size for size in resolutions),
        "mid_attention": attends,
        "z_channels": values["z_channels"],
        "dropout": values["dropout"],
    }


def first_stage_options(config: schema.FirstStageModelConfig) -> dict[str, Any]:
    """Inverse of `first_stage_config`, with a `lossconfig` that does nothing.

    The weights and the decay of the codebook's loss are no options there and are left out.
    ValueError for attention at some levels but not in the middle, which the reference cannot build.
    """
    if isinstance(config, schema.IdentityFirstStageConfig):
        return {}
    if config.attention_downsample and not config.mid_attention:
        raise ValueError(
            f"attention_downsample={config.attention_downsample} with mid_attention=False: the"
            " reference has attention in the middle block too, or none at all"
        )
    quantized = isinstance(config, schema.AutoencoderVQConfig)
    ddconfig = {
        "double_z": not quantized,
        "z_channels": config.z_channels,
        "resolution": RESOLUTION,
        "in_channels": config.in_channels,
        "out_ch": config.out_channels,
        "ch": config.channels,
        "ch_mult": list(config.channel_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": [RESOLUTION // factor for factor in config.attention_downsample],
        "dropout": config.dropout,
        **({} if config.mid_attention else {"attn_type": "none"}),
    }
    return {
        "embed_dim": config.embed_dim,
        **({"n_embed": config.num_codes} if quantized else {}),
        "ddconfig": ddconfig,
        "lossconfig": {"target": "torch.nn.Identity"},
    }


def first_stage_target(config: schema.FirstStageModelConfig) -> str:
    """`first_stage_config.target` of a latent diffusion model with this first stage."""
    match config:
        case schema.IdentityFirstStageConfig():
            return "ldm.models.autoencoder.IdentityFirstStage"
        case schema.AutoencoderVQConfig():
            return "ldm.models.autoencoder.VQModelInterface"
    return "ldm.models.autoencoder.AutoencoderKL"


def read(
    options: Mapping[str, Any],
    where: str,
    *,
    required: tuple[str, ...],
    optional: dict[str, Any],
    fixed: dict[str, Any],
    ignored: tuple[str, ...],
) -> dict[str, Any]:
    """The required and optional values; ValueError for a missing key or one not listed here."""
    missing = [key for key in required if key not in options]
    unknown = sorted(set(options) - {*required, *optional, *fixed, *ignored})
    changed = [f"{k}={options[k]!r}" for k, v in fixed.items() if k in options and options[k] != v]
    for what, keys in (("missing", missing), ("unknown", unknown), ("not supported", changed)):
        if keys:
            raise ValueError(f"{where}: {what}: {', '.join(keys)}")
    return {**optional, **{k: options[k] for k in (*required, *optional) if k in options}}


def _labels(classes: int | str | None, width: int | None) -> tuple[int | None, int | None]:
    """(num_classes, vector_dim): "sequential" stands for a vector of `adm_in_channels`."""
    if isinstance(classes, str) and classes != "sequential":
        raise ValueError(f"unet_config: num_classes={classes!r} is not supported")
    if classes == "sequential" and width is None:
        raise ValueError("unet_config: num_classes='sequential' needs adm_in_channels")
    if classes != "sequential" and width is not None:
        raise ValueError(f"unet_config: adm_in_channels={width} needs num_classes='sequential'")
    return (None, width) if classes == "sequential" else (classes, None)


def _given(value: int) -> int | None:
    """None for -1, as the reference writes it."""
    return None if value == -1 else value


def _same(value):
    """One value for all levels, of which Stable Diffusion 2 may write a list; ValueError if
    unequal."""
    if not isinstance(value, (list, tuple)):
        return value
    if len(set(value)) != 1:
        raise ValueError(f"unet_config: {list(value)}: one value for all levels is supported")
    return value[0]


def _head_channels(config: schema.UNetConfig) -> int:
    """The width of a head that gives every level its heads."""
    channels = [config.model_channels * mult for mult in config.channel_mult]
    widths = {c // heads for c, heads in zip(channels, config.num_heads, strict=True)}
    if len(widths) != 1:
        raise ValueError(
            f"num_heads={config.num_heads} on levels of width {channels}: heads of one width can be"
            f" written (num_head_channels), these have {sorted(widths)}"
        )
    return widths.pop()
