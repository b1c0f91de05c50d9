"""`config.json` of diffusers' UNets in our terms, and back."""

from collections.abc import Mapping
from typing import Any

from ldm_jax import schema
from ldm_jax.convert.diffusers import part_configs

CLASSES = ("UNet2DConditionModel", "UNet2DModel")

# Defaults, in diffusers' own classes, of options that are not in the file.
UNET_DEFAULTS = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "dropout": 0.0,
    "only_cross_attention": False,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "upcast_attention": False,
    "resnet_time_scale_shift": "default",
    "class_embed_type": None,
    "num_class_embeds": None,
    "projection_class_embeddings_input_dim": None,
}
PLAIN_UNET_DEFAULTS = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
    "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "resnet_time_scale_shift": "default",
    "attn_norm_num_groups": None,
    "num_class_embeds": None,
}
# Options with one supported value, or several that compute the same.
BOTH_UNETS_FIXED = {
    **part_configs.COMMON_FIXED,
    "center_input_sample": (False,),
    "downsample_padding": (1,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "norm_eps": (1e-5,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
}
UNET_FIXED = {
    **BOTH_UNETS_FIXED,
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
}
PLAIN_UNET_FIXED = {
    **BOTH_UNETS_FIXED,
    "add_attention": (True,),
    "class_embed_type": (None,),
    "mid_block_type": ("UNetMidBlock2D",),
}


def unet_config(options: Mapping[str, Any], where: str) -> schema.UNetConfig:
    """A UNet's config.json in our terms. ValueError names the file and the option that cannot be
    translated."""
    name = part_configs.class_name(options)
    if name == "UNet2DConditionModel":
        return _condition_unet(options, where)
    if name == "UNet2DModel":
        return _plain_unet(options, where)
    raise ValueError(f"{where}: _class_name {name} is not one of {', '.join(CLASSES)}")


def _condition_unet(options: Mapping[str, Any], where: str) -> schema.UNetConfig:
    values = part_configs.read(options, where, UNET_DEFAULTS, UNET_FIXED)
    width, mult = part_configs.widths(values, where)
    attends = part_configs.levels(values, where, "CrossAttn", "Down", "Up")
    levels = len(mult)
    only = values["only_cross_attention"]
    only = (only,) * levels if isinstance(only, bool) else tuple(only)
    heads = values["attention_head_dim"]  # despite its name, the number of heads in this class
    if heads is None:
        raise ValueError(f"{where}: attention_head_dim=None is not supported")
    projected = values["class_embed_type"] == "projection"
    if values["class_embed_type"] not in (None, "projection"):
        raise ValueError(
            f"{where}: class_embed_type={values['class_embed_type']!r} is not supported"
        )
    return schema.UNetConfig(
        **_shared(values, where),
        model_channels=width,
        channel_mult=mult,
        attention_downsample=attends,
        num_heads=heads if isinstance(heads, int) else tuple(heads),
        spatial_transformer=True,
        transformer_depth=part_configs.same(values["transformer_layers_per_block"], where),
        context_dim=part_configs.same(values["cross_attention_dim"], where),
        only_cross_attention=only if any(only) else (),
        linear_projection=values["use_linear_projection"],
        upcast_attention=values["upcast_attention"],
        num_classes=None if projected else values["num_class_embeds"],
        vector_dim=values["projection_class_embeddings_input_dim"] if projected else None,
    )


def _plain_unet(options: Mapping[str, Any], where: str) -> schema.UNetConfig:
    values = part_configs.read(options, where, PLAIN_UNET_DEFAULTS, PLAIN_UNET_FIXED)
    width, mult = part_configs.widths(values, where)
    head_width = values["attention_head_dim"]
    shared = _shared(values, where)
    if shared["scale_shift_norm"] and values["attn_norm_num_groups"] != 32:
        raise ValueError(
            f"{where}: attn_norm_num_groups={values['attn_norm_num_groups']} with"
            " resnet_time_scale_shift='scale_shift' leaves the middle attention without its norm,"
            " which is not supported: 32 is"
        )
    if values["attn_norm_num_groups"] not in (None, 32):
        raise ValueError(
            f"{where}: attn_norm_num_groups={values['attn_norm_num_groups']} is not supported"
        )
    return schema.UNetConfig(
        **shared,
        model_channels=width,
        channel_mult=mult,
        attention_downsample=part_configs.levels(values, where, "Attn", "Down", "Up"),
        num_heads=1 if head_width is None else None,
        num_head_channels=head_width,
        spatial_transformer=False,
        context_dim=None,
        resblock_updown=_resampling_blocks(values, where),
        num_classes=values["num_class_embeds"],
    )


def _shared(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Fields that both UNets read alike."""
    shift = values["resnet_time_scale_shift"]
    if shift not in ("default", "scale_shift"):
        raise ValueError(f"{where}: resnet_time_scale_shift={shift!r} is not supported")
    return {
        "in_channels": values["in_channels"],
        "out_channels": values["out_channels"],
        "num_res_blocks": part_configs.same(values["layers_per_block"], where),
        "scale_shift_norm": shift == "scale_shift",
        "dropout": values["dropout"],
    }


def _resampling_blocks(values: dict[str, Any], where: str) -> bool:
    """True if residual blocks change the resolution, as on every level, down and up."""
    kinds = set()
    for key, kind in (("down_block_types", "downsample_type"), ("up_block_types", "upsample_type")):
        for block in values[key][:-1]:  # nothing follows the last
            plain = block in ("DownBlock2D", "UpBlock2D")
            kinds.add("conv" if plain else "resnet" if "Resnet" in block else values[kind])
    if not kinds <= {"conv", "resnet"} or len(kinds) > 1:
        raise ValueError(
            f"{where}: down_block_types={values['down_block_types']} and up_block_types="
            f"{values['up_block_types']} with downsample_type={values['downsample_type']!r} and"
            f" upsample_type={values['upsample_type']!r} change the resolution in several ways: one"
            " way, 'conv' or 'resnet', is supported"
        )
    return kinds == {"resnet"}


def unet_options(config: schema.UNetConfig, sample_size: int) -> dict[str, Any]:
    """Inverse of `unet_config`. ValueError for what neither class of diffusers can build.

    sample_size: side of the latent of a training image.
    """
    if config.channel_mult[0] != 1:
        raise ValueError(
            f"unet.channel_mult={config.channel_mult}: diffusers' UNets start with 1 times"
            " model_channels"
        )
    attends = [2**i in config.attention_downsample for i in range(len(config.channel_mult))]
    shared = {
        "sample_size": sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": [config.model_channels * m for m in config.channel_mult],
        "layers_per_block": config.num_res_blocks,
        "dropout": config.dropout,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
        "num_class_embeds": config.num_classes,
    }
    if config.spatial_transformer:
        return _condition_unet_options(config, attends, shared)
    return _plain_unet_options(config, attends, shared)


def _condition_unet_options(
    config: schema.UNetConfig, attends: list[bool], shared: dict[str, Any]
) -> dict[str, Any]:
    if config.resblock_updown or config.context_dim is None:
        raise ValueError(
            f"unet.resblock_updown={config.resblock_updown}, unet.context_dim={config.context_dim}:"
            " diffusers' UNet2DConditionModel has no residual blocks that change the resolution and"
            " needs a context"
        )
    heads = _heads(config)
    vector = config.vector_dim is not None
    only = list(config.only_cross_attention)
    return {
        "_class_name": "UNet2DConditionModel",
        **shared,
        "down_block_types": [f"{'CrossAttn' if a else ''}DownBlock2D" for a in attends],
        "up_block_types": [f"{'CrossAttn' if a else ''}UpBlock2D" for a in attends[::-1]],
        "cross_attention_dim": config.context_dim,
        "transformer_layers_per_block": config.transformer_depth,
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
        "use_linear_projection": config.linear_projection,
        "upcast_attention": config.upcast_attention,
        "only_cross_attention": only or False,
        "class_embed_type": "projection" if vector else None,
        "projection_class_embeddings_input_dim": config.vector_dim,
        **{key: allowed[0] for key, allowed in UNET_FIXED.items()},
    }


def _plain_unet_options(
    config: schema.UNetConfig, attends: list[bool], shared: dict[str, Any]
) -> dict[str, Any]:
    if config.vector_dim is not None:
        raise ValueError(f"unet.vector_dim={config.vector_dim}: diffusers' UNet2DModel has no such")
    # the middle block attends always, at the last level's width
    used = {
        (width, heads)
        for width, heads, a in zip(
            shared["block_out_channels"], _heads(config), [*attends[:-1], True], strict=True
        )
        if a
    }
    head_widths = {width // heads for width, heads in used}
    single = all(heads == 1 for _, heads in used)
    if len(head_widths) > 1 and not single:
        raise ValueError(
            f"unet.num_heads={config.num_heads}: the heads are {sorted(head_widths)} wide, but"
            " those of diffusers' UNet2DModel have one width at all levels"
        )
    change = "resnet" if config.resblock_updown else "conv"

    def blocks(attends: list[bool], way: str, resampling: str) -> list[str]:
        plain = [way if change == "conv" else resampling] * (len(attends) - 1) + [way]
        return [f"Attn{way}" if a else other for a, other in zip(attends, plain, strict=True)]

    return {
        "_class_name": "UNet2DModel",
        **shared,
        "down_block_types": blocks(attends, "DownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": blocks(attends[::-1], "UpBlock2D", "ResnetUpsampleBlock2D"),
        "attention_head_dim": None if single else head_widths.pop(),
        "downsample_type": change,
        "upsample_type": change,
        "attn_norm_num_groups": 32 if config.scale_shift_norm else None,
        **{key: allowed[0] for key, allowed in PLAIN_UNET_FIXED.items()},
    }


def _heads(config: schema.UNetConfig) -> list[int]:
    """Attention heads of each level."""
    if config.num_head_channels is not None:
        return [config.model_channels * m // config.num_head_channels for m in config.channel_mult]
    heads = config.num_heads
    return list(heads) if isinstance(heads, tuple) else [heads] * len(config.channel_mult)
