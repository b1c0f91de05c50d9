"""`config.json` of diffusers' autoencoders and of text encoders in our terms, and back.

Every option of a config's class is read: an option with a field of ours is translated, one with a
single value in all supported models is checked, one without effect is ignored.
"""

import re
from collections.abc import Mapping
from typing import Any

from ldm_jax import finite, schema
from ldm_jax.runtime.log import LOG

FIRST_STAGE_CLASSES = ("AutoencoderKL", "VQModel")

# Defaults, in diffusers' own classes, of options that are not in the file.
FIRST_STAGE_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "mid_block_add_attention": True,
}
KL_DEFAULTS = {**FIRST_STAGE_DEFAULTS, "latent_channels": 4}
VQ_DEFAULTS = {
    **FIRST_STAGE_DEFAULTS,
    "latent_channels": 3,
    "num_vq_embeddings": 256,
    "vq_embed_dim": None,
}

TEXT_DEFAULTS = {
    "clip_text_model": {
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "hidden_act": "quick_gelu",
    },
    "ldmbert": {
        "vocab_size": 30522,
        "max_position_embeddings": 77,
        "d_model": 1280,
        "encoder_ffn_dim": 5120,
        "encoder_layers": 32,
        "encoder_attention_heads": 8,
        "head_dim": 64,
    },
}

# Options with one supported value, or several that compute the same.
COMMON_FIXED = {"act_fn": ("silu", "swish"), "norm_num_groups": (32,)}
KL_FIXED = {
    **COMMON_FIXED,
    "latents_mean": (None,),
    "latents_std": (None,),
    "shift_factor": (None,),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
VQ_FIXED = {**COMMON_FIXED, "lookup_from_codebook": (False,), "norm_type": ("group",)}

TEXT_FIXED = {
    "clip_text_model": {
        "hidden_act": ("quick_gelu", "gelu"),
        "layer_norm_eps": (1e-5,),
        "use_attention_mask": (False, None),
    },
    "ldmbert": {"activation_function": ("gelu",)},
}

# Options with one value, or one for each level.
PER_LEVEL = (
    "attention_head_dim",
    "cross_attention_dim",
    "layers_per_block",
    "only_cross_attention",
    "sample_size",
    "transformer_layers_per_block",
)
# Limits above every published model: a damaged file must not make the machine allocate or loop.
MOST, MOST_LAYERS, MOST_LEVELS = 2**24, 256, 16

# Options without an effect of their own, or with one in the former Flax classes only.
IGNORED = (
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",
    "force_upcast",
    "mid_block_only_cross_attention",  # of a middle block that is refused
    "num_train_timesteps",
    "split_head_dim",
    "use_memory_efficient_attention",
)

# Options that no class of diffusers has, and that do not change the output: EMAModel's averaging in
# training, tiling and slicing, notes.
NOTHING = {
    *("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step"),
    *("use_ema_warmup", "gradient_checkpointing", "use_tiling", "use_slicing"),
    *("tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor"),
    *("notes", "note", "comment", "description", "author", "license"),
}
NEWEST = (0, 42)
"""Newest version of diffusers of which every option is known here. A config of it or an older one
may hold others, which its class ignores."""


def class_name(options: Mapping[str, Any]) -> str:
    """The class of a config, without the `Flax` of diffusers' Flax classes."""
    return str(options.get("_class_name")).removeprefix("Flax")


# --- first stages --------------------------------------------------------------------------------


def first_stage_config(
    options: Mapping[str, Any], where: str
) -> tuple[schema.FirstStageModelConfig, float]:
    """An autoencoder's config.json in our terms, and its scale. ValueError as in `unet_config`."""
    name = class_name(options)
    if name not in FIRST_STAGE_CLASSES:
        raise ValueError(
            f"{where}: _class_name {name} is not one of {', '.join(FIRST_STAGE_CLASSES)}"
        )
    quantized = name == "VQModel"
    values = read(
        options,
        where,
        VQ_DEFAULTS if quantized else KL_DEFAULTS,
        VQ_FIXED if quantized else KL_FIXED,
    )
    width, mult = widths(values, where)
    z = values["latent_channels"]
    fields = {
        "in_channels": values["in_channels"],
        "out_channels": values["out_channels"],
        "channels": width,
        "channel_mult": mult,
        "num_res_blocks": same(values["layers_per_block"], where),
        "attention_downsample": levels(values, where, "Attn", "DownEncoder", "UpDecoder"),
        "mid_attention": values["mid_block_add_attention"],
        "z_channels": z,
    }
    scale = finite.checked(values["scaling_factor"], f"{where}: scaling_factor", nonzero=True)
    if not quantized:
        return schema.AutoencoderKLConfig(**fields, embed_dim=z), scale
    width = values["vq_embed_dim"]
    return schema.AutoencoderVQConfig(
        **fields,
        embed_dim=z if width is None else width,
        num_codes=values["num_vq_embeddings"],
    ), scale


def first_stage_options(
    config: schema.FirstStageModelConfig, scale: float, sample_size: int
) -> dict[str, Any]:
    """Inverse of `first_stage_config`. ValueError for what diffusers' classes cannot build.

    sample_size: side of a training image.
    """
    quantized = isinstance(config, schema.AutoencoderVQConfig)
    if config.channel_mult[0] != 1 or not (quantized or config.z_channels == config.embed_dim):
        raise ValueError(
            f"first_stage.channel_mult={config.channel_mult}, z_channels={config.z_channels},"
            f" embed_dim={config.embed_dim}: diffusers' AutoencoderKL and VQModel start with 1"
            " times the first width, and in AutoencoderKL the latter two are equal"
        )
    attends = [2**i in config.attention_downsample for i in range(len(config.channel_mult))]
    return {
        "_class_name": "VQModel" if quantized else "AutoencoderKL",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": [f"{'Attn' if a else ''}DownEncoderBlock2D" for a in attends],
        "up_block_types": [f"{'Attn' if a else ''}UpDecoderBlock2D" for a in attends[::-1]],
        "block_out_channels": [config.channels * m for m in config.channel_mult],
        "layers_per_block": config.num_res_blocks,
        "latent_channels": config.z_channels,
        "mid_block_add_attention": config.mid_attention,
        "sample_size": sample_size,
        "scaling_factor": scale,
        **({"num_vq_embeddings": config.num_codes} if quantized else {}),
        **({"vq_embed_dim": config.embed_dim} if quantized else {}),
        **{k: allowed[0] for k, allowed in (VQ_FIXED if quantized else KL_FIXED).items()},
    }


# --- text encoders -------------------------------------------------------------------------------


def text_config(
    options: Mapping[str, Any], where: str
) -> schema.CLIPTextConfig | schema.BERTTextConfig:
    """A text encoder's config.json in our terms: CLIP of transformers, or diffusers' LDMBertModel.

    ValueError names the file and what cannot be translated. Options that transformers adds to every
    config are ignored.
    """
    kind = options.get("model_type")
    if kind not in TEXT_FIXED:
        raise ValueError(f"{where}: model_type={kind!r} is not one of {', '.join(TEXT_FIXED)}")
    values = read(options, where, TEXT_DEFAULTS[kind], TEXT_FIXED[kind], ignored=tuple(options))
    if kind == "clip_text_model":
        return schema.CLIPTextConfig(
            vocab_size=values["vocab_size"],
            max_length=values["max_position_embeddings"],
            width=values["hidden_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=values["num_attention_heads"],
            mlp_width=values["intermediate_size"],
            activation=values["hidden_act"],
        )
    if values["encoder_ffn_dim"] != 4 * values["d_model"]:
        raise ValueError(
            f"{where}: encoder_ffn_dim={values['encoder_ffn_dim']} with d_model="
            f"{values['d_model']}: four times is supported"
        )
    return schema.BERTTextConfig(
        vocab_size=values["vocab_size"],
        max_length=values["max_position_embeddings"],
        width=values["d_model"],
        num_layers=values["encoder_layers"],
        num_heads=values["encoder_attention_heads"],
        head_width=values["head_dim"],
    )


def text_options(config: schema.CLIPTextConfig | schema.BERTTextConfig) -> dict[str, Any]:
    """Inverse of `text_config`. ValueError for another layer than the last."""
    if isinstance(config, schema.BERTTextConfig):
        return {
            "architectures": ["LDMBertModel"],
            "model_type": "ldmbert",
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_length,
            "d_model": config.width,
            "encoder_ffn_dim": 4 * config.width,
            "encoder_layers": config.num_layers,
            "encoder_attention_heads": config.num_heads,
            "head_dim": config.head_width,
            "activation_function": "gelu",
            "pad_token_id": 0,
        }
    if config.layer != "last":
        raise ValueError(f"layer={config.layer!r}: the text encoders of diffusers give the last")
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": config.activation,
        "layer_norm_eps": 1e-5,
        # ids of the pooled output, which these models do not use: CLIP's are its last two
        "bos_token_id": config.vocab_size - 2,
        "eos_token_id": config.vocab_size - 1,
        "pad_token_id": 1,
    }


# --- reading -------------------------------------------------------------------------------------


def read(
    options: Mapping[str, Any],
    where: str,
    defaults: Mapping[str, Any],
    fixed: Mapping[str, tuple],
    ignored: tuple[str, ...] = IGNORED,
) -> dict[str, Any]:
    """Values of the options in `defaults`; logs options that the class does not have.

    ValueError for a value that `fixed` does not allow, and for an unknown option that is switched
    on in a config of a version newer than `NEWEST`.
    """
    known = {*defaults, *fixed, *ignored}
    others = [k for k, v in options.items() if k not in known and _is_on(k, v)]
    left = [k for k in others if k in NOTHING or _version(options) <= NEWEST]
    refused = [
        f"{key}={value!r:.200}"
        for key, value in options.items()
        if (key in fixed and value not in fixed[key])
        or (key in defaults and not _plausible(key, value, defaults[key]))
        or (key in others and key not in left)
    ]
    if refused:
        raise ValueError(f"{where}: not supported: {', '.join(refused)}")
    if left:
        said = ", ".join(f"{key}={options[key]!r:.80}" for key in left)
        LOG.info(f"{where}: left out, as the class has no such option: {said}")
    return {key: options.get(key, default) for key, default in defaults.items()}


def _is_on(key: str, value: Any) -> bool:
    return not key.startswith("_") and value not in (None, False)


def _version(options: Mapping[str, Any]) -> tuple[int, ...]:
    """Version of diffusers that wrote a config; a very new one if it does not say."""
    match = re.match(r"(\d+)\.(\d+)", str(options.get("_diffusers_version", "")))
    return (int(match[1]), int(match[2])) if match else (9**9,)


def _plausible(key: str, value: Any, default: Any) -> bool:
    """True if an option has the type of its default, and a size within the limits."""
    if isinstance(value, list | tuple):
        listed = isinstance(default, list) or key in PER_LEVEL
        if not listed or not 0 < len(value) <= MOST_LEVELS:
            return False
        one = default[0] if isinstance(default, list) else default
        return all(not isinstance(x, list | tuple) and _plausible(key, x, one) for x in value)
    if value is None:
        return default is None or key == "attention_head_dim"
    if isinstance(default, list):
        return False
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(value, int | float) and not isinstance(default, str):
        most = MOST_LAYERS if "layers" in key else MOST
        return 0 <= value <= most and (isinstance(value, int) or isinstance(default, float))
    return isinstance(value, str) and (default is None or isinstance(default, str))


def widths(values: dict[str, Any], where: str) -> tuple[int, tuple[int, ...]]:
    """(first width, each level's multiple of it)."""
    channels = values["block_out_channels"]
    if 0 in channels or any(width % channels[0] for width in channels):
        raise ValueError(
            f"{where}: block_out_channels={list(channels)}: multiples of the first are supported"
        )
    return channels[0], tuple(width // channels[0] for width in channels)


def levels(
    values: dict[str, Any], where: str, attention: str, down: str, up: str
) -> tuple[int, ...]:
    """Downsampling factors of the levels with attention, falling, as the reference writes them.

    ValueError for a block of another kind.
    """
    resampling = {"Down": "ResnetDownsampleBlock2D", "Up": "ResnetUpsampleBlock2D"}
    resampling = resampling if attention == "Attn" else {}
    attends_on = []
    for key, way in (("down_block_types", down), ("up_block_types", up)):
        kinds = {f"{way}Block2D": False, f"{attention}{way}Block2D": True}
        if way in resampling:
            kinds[resampling[way]] = False
        odd = sorted({block for block in values[key] if block not in kinds})
        if odd or len(values[key]) != len(values["block_out_channels"]):
            raise ValueError(
                f"{where}: {key}={list(values[key])}: supported is one of {', '.join(kinds)} for"
                f" each of the {len(values['block_out_channels'])} block_out_channels"
            )
        attends_on.append([kinds[block] for block in values[key]])
    if attends_on[0] != attends_on[1][::-1]:
        raise ValueError(
            f"{where}: down_block_types={list(values['down_block_types'])} and up_block_types="
            f"{list(values['up_block_types'])} do not attend at the same levels"
        )
    return tuple(2**level for level, attends in enumerate(attends_on[0]) if attends)[::-1]


def same(value: Any, where: str) -> Any:
    """One value for all levels; ValueError where they differ."""
    if not isinstance(value, list | tuple):
        return value
    if len(set(map(str, value))) != 1:
        raise ValueError(f"{where}: {list(value)}: one value for all levels is supported")
    return value[0]
