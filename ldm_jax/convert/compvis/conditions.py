"""Conditioning of a CompVis model: from the options of its YAML to our config, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ldm_jax import conditioning, schema
from ldm_jax.convert.compvis import single_file, yaml_options

# Our schedules by the reference's names (`make_beta_schedule`).
SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine", "sqrt": "sqrt"}

KINDS = (
    "LatentDiffusion",
    "Layout2ImgDiffusion",
    "LatentInpaintDiffusion",
    "LatentDepth2ImageDiffusion",
    "LatentUpscaleDiffusion",
)
"""Last names of the models' targets; the last three differ in the image of a hybrid."""

IS_FIRST_STAGE, IS_UNCONDITIONAL = "__is_first_stage__", "__is_unconditional__"
ENCODERS = "ldm.modules.encoders.modules."
IDENTITY = {"target": "torch.nn.Identity"}
IMAGENET = 1000  # classes; the table of cin256-v2 has one more, the null class
VIT_L = schema.CLIPTextConfig()
VIT_H = schema.CLIPTextConfig(
    width=1024, num_layers=24, num_heads=16, mlp_width=4096, activation="gelu"
)
HEADS, HEAD_WIDTH = 8, 64  # of a BERTEmbedder, whatever its width
SD_INPAINT = schema.InpaintCondConfig("mask_image", (0.0, 1.0), 0.0)


def params_of(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `params` of a part, which may be left out."""
    return part.get("params") or {}


def _conditioning_key(values: Mapping[str, Any]) -> str | None:
    """`conditioning_key` of a YAML; in older files it follows from other options."""
    if values["cond_stage_config"] == IS_UNCONDITIONAL:
        return None
    return values["conditioning_key"] or ("concat" if values["concat_mode"] else "crossattn")


def cond_config(
    kind: str,
    values: Mapping[str, Any],
    unet: schema.UNetConfig,
    first_stage: schema.FirstStageModelConfig,
    shapes: Mapping[str, tuple],
    guesses: list[str],
) -> schema.CondConfig:
    key, stage = _conditioning_key(values), values["cond_stage_config"]
    if key is None:
        return None
    if stage == IS_FIRST_STAGE and key == "concat":
        return schema.InpaintCondConfig()
    name = stage if isinstance(stage, str) else stage["target"].rpartition(".")[2]
    if name == "Identity":
        if key == "concat" and values["cond_stage_key"] == "LR_image":
            return schema.SuperResCondConfig(factor=first_stage.downsample)
        if key == "crossattn":
            return schema.EmbeddingCondConfig(width=unet.context_dim)
        if key == "adm" and unet.num_classes is not None:
            null = unet.num_classes == IMAGENET + 1
            return schema.ClassCondConfig(
                unet.num_classes - null, via="label", dropout=0.1 * null, null_class=null
            )
    elif not isinstance(stage, str):
        cond = cond_stage_config(name, params_of(stage), shapes, values["cond_stage_trainable"])
        if isinstance(cond, schema.ClassCondConfig) and cond.num_classes not in (1, IMAGENET):
            guesses.append(f"{cond.num_classes} classes, null class: {cond.null_class}")
        concat = isinstance(cond, schema.SemanticCondConfig)
        if key == ("concat" if concat else "crossattn"):
            return cond
        if isinstance(cond, schema.TextCondConfig) and key in ("hybrid", "hybrid-adm"):
            return schema.HybridCondConfig(cond, _hybrid(kind, key, values, first_stage))
    raise ValueError(
        f"model: conditioning_key={key!r} with cond_stage_config {name} and cond_stage_key"
        f" {values['cond_stage_key']!r} is not supported"
    )


def _hybrid(
    kind: str, key: str, values: Mapping[str, Any], first_stage: schema.FirstStageModelConfig
) -> schema.InpaintCondConfig | schema.DepthCondConfig | schema.UpscaleCondConfig:
    """The image beside the text: by the class of the model, as in the reference."""
    if (kind, key) == ("LatentInpaintDiffusion", "hybrid"):
        return SD_INPAINT
    if (kind, key) == ("LatentDepth2ImageDiffusion", "hybrid"):
        return schema.DepthCondConfig()
    if (kind, key) != ("LatentUpscaleDiffusion", "hybrid-adm"):
        raise ValueError(f"model: conditioning_key={key!r} of {kind} is not supported")
    low = params_of(values["low_scale_config"] or {})
    noise = low.get("noise_schedule_config") or {}
    name = noise.get("beta_schedule", "linear")
    known = SCHEDULES.get(name) in ("scaled_linear", "linear")
    if not known or noise.get("timesteps", 1000) != 1000:
        raise ValueError(f"low_scale_config: noise schedule {noise} is not supported")
    return schema.UpscaleCondConfig(
        factor=first_stage.downsample,
        max_noise_level=low.get("max_noise_level", 1000),
        schedule=SCHEDULES[name],
        beta_start=float(noise.get("linear_start", 1e-4)),
        beta_end=float(noise.get("linear_end", 2e-2)),
    )


def cond_stage_config(
    target: str, options: Mapping[str, Any], shapes: Mapping[str, tuple], trainable: bool = True
) -> schema.CondConfig:
    """`cond_stage_config` of an encoder with parameters, in our terms.

    target: the last name of its `target`. shapes: as in `config_of`.
    The table of a ClassEmbedder ends with the null class if it has 1001 rows (cin256-v2) or the
    YAML gives a `ucg_rate`; 1000 rows, the reference's default, are ImageNet's classes alone.
    """
    read = yaml_options.read
    if target == "ClassEmbedder":
        v = read(
            options,
            target,
            required=("embed_dim",),
            optional={"n_classes": IMAGENET, "ucg_rate": None},
            fixed={},
            ignored=("key",),
        )
        null = v["n_classes"] == IMAGENET + 1 or v["ucg_rate"] is not None
        return schema.ClassCondConfig(
            num_classes=v["n_classes"] - null,
            embed_dim=v["embed_dim"],
            dropout=0.1 * null if v["ucg_rate"] is None else float(v["ucg_rate"]),
            null_class=null,
        )
    if target == "SpatialRescaler":
        v = read(
            options,
            target,
            required=("in_channels",),
            optional={"n_stages": 1, "out_channels": None},
            fixed={"method": "bilinear", "multiplier": 0.5, "bias": False},
            ignored=(),
        )
        return schema.SemanticCondConfig(v["in_channels"], v["out_channels"], v["n_stages"])
    if target == "BERTEmbedder":
        v = read(
            options,
            target,
            required=("n_embed", "n_layer"),
            optional={"vocab_size": 30522, "max_seq_len": 77, "use_tokenizer": True},
            fixed={"embedding_dropout": 0.0},
            ignored=("device",),
        )
        encoder = schema.BERTTextConfig(
            v["vocab_size"], v["max_seq_len"], v["n_embed"], v["n_layer"]
        )
        if v["use_tokenizer"]:
            return schema.TextCondConfig(encoder, trainable=trainable)
        return schema.LayoutCondConfig(encoder)
    return _clip(target, options, shapes)


def _clip(
    target: str, options: Mapping[str, Any], shapes: Mapping[str, tuple]
) -> schema.TextCondConfig:
    """CLIP text encoders; their sizes are the checkpoint's, or those of the usual weights."""
    ignored = ("version", "device", "freeze", "arch", "max_length", "layer_idx")
    stage = {
        n.removeprefix(single_file.COND_STAGE): s
        for n, s in shapes.items()
        if n.startswith(single_file.COND_STAGE)
    }
    read = {"required": (), "ignored": ignored}
    if target == "FrozenCLIPEmbedder":
        yaml_options.read(options, target, optional={}, fixed={"layer": "last"}, **read)
        encoder = single_file.clip_text_config(stage) if stage else VIT_L
    elif target == "FrozenOpenCLIPEmbedder":
        layer = yaml_options.read(options, target, optional={"layer": "last"}, fixed={}, **read)[
            "layer"
        ]
        if layer not in ("last", "penultimate"):
            raise ValueError(f"{target}: layer={layer!r} is not one of last, penultimate")
        encoder = (
            single_file.open_clip_text_config(stage, layer)
            if stage
            else dataclasses.replace(VIT_H, layer=layer)
        )
    else:
        raise ValueError(f"cond_stage_config: {target} is not supported")
    return schema.TextCondConfig(encoder, trainable=False)


# --- and back ------------------------------------------------------------------------------------


def cond_options(config: schema.LatentDiffusionConfig) -> tuple[str, dict[str, Any]]:
    """(last name of the model's target, the options of `model.params` about conditioning)."""
    cond = config.cond
    match cond:
        case None:
            return KINDS[0], {"cond_stage_config": IS_UNCONDITIONAL}
        case schema.InpaintCondConfig():
            _same_inpainting(cond, schema.InpaintCondConfig())
            return KINDS[0], _options("concat", IS_FIRST_STAGE, "masked_image", False)
        case schema.SuperResCondConfig():
            return KINDS[0], _options("concat", IDENTITY, "LR_image", False)
        case schema.EmbeddingCondConfig():
            return KINDS[0], _options("crossattn", IDENTITY, "nix", False)
        case schema.ClassCondConfig(via="label"):
            return KINDS[0], _options("adm", IDENTITY, "class_label", False)
        case schema.SemanticCondConfig():
            return KINDS[0], _options("concat", _stage_options(cond), "segmentation", True)
        case schema.ClassCondConfig():
            return KINDS[0], _options("crossattn", _stage_options(cond), "class_label", True)
        case schema.LayoutCondConfig():
            return KINDS[1], _options("crossattn", _stage_options(cond), "coordinates_bbox", True)
        case schema.TextCondConfig():
            options = _options("crossattn", _stage_options(cond), "caption", cond.trainable)
            return KINDS[0], options
        case schema.HybridCondConfig():
            return _hybrid_options(cond)
    raise ValueError(f"a {conditioning.name_of(cond)} alone has no option in a CompVis YAML")


def _options(key: str, stage: Any, read: str, trainable: bool) -> dict[str, Any]:
    return {
        "cond_stage_key": read,
        "cond_stage_trainable": trainable,
        "conditioning_key": key,
        "cond_stage_config": stage,
    }


def _hybrid_options(cond: schema.HybridCondConfig) -> tuple[str, dict[str, Any]]:
    options = _options("hybrid", _stage_options(cond.text), "txt", cond.text.trainable)
    match cond.concat:
        case schema.InpaintCondConfig():
            _same_inpainting(cond.concat, SD_INPAINT)
            return KINDS[2], options
        case schema.DepthCondConfig():
            return KINDS[3], options
    low = cond.concat
    names = {ours: theirs for theirs, ours in SCHEDULES.items()}
    noise = {
        "beta_schedule": names[low.schedule],
        "linear_start": low.beta_start,
        "linear_end": low.beta_end,
    }
    target = "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation"
    params = {"noise_schedule_config": noise, "max_noise_level": low.max_noise_level}
    options |= {
        "conditioning_key": "hybrid-adm",
        "low_scale_key": "lr",
        "low_scale_config": {"target": target, "params": params},
    }
    return KINDS[4], options


def _same_inpainting(cond: schema.InpaintCondConfig, known: schema.InpaintCondConfig) -> None:
    if dataclasses.replace(cond, dropout=0.0) != known:
        raise ValueError(f"{cond} has no option in a CompVis YAML, only {known}")


def open_clip_layer(encoder: schema.CLIPTextConfig) -> str:
    """`layer` of a FrozenOpenCLIPEmbedder, which has all blocks of OpenCLIP even if the file has
    not.

    An odd number of blocks lacks the last one (`single_file.open_clip_text_config`), so that the
    last of the file is the penultimate there.
    """
    return "penultimate" if encoder.num_layers % 2 else encoder.layer


def with_layer_of_file(
    model: Mapping[str, Any], config: schema.LatentDiffusionConfig
) -> Mapping[str, Any]:
    """The `model` section with the layer as our first files say it: counted in the file's blocks.

    model: see `model_yaml.model_options`.
    """
    text = schema.text_of(config.cond)
    encoder = None if text is None else text.encoder
    if not isinstance(encoder, schema.CLIPTextConfig) or encoder.activation != "gelu":
        return model
    stage = model["params"]["cond_stage_config"]
    stage = {**stage, "params": {**stage["params"], "layer": encoder.layer}}
    return {**model, "params": {**model["params"], "cond_stage_config": stage}}


def _stage_options(cond: schema.CondConfig) -> dict[str, Any]:
    """`cond_stage_config` of an encoder with parameters."""
    match cond:
        case schema.ClassCondConfig():
            rows = cond.num_classes + cond.null_class
            return _stage("ClassEmbedder", n_classes=rows, embed_dim=cond.embed_dim)
        case schema.SemanticCondConfig():
            return _stage(
                "SpatialRescaler",
                n_stages=cond.stages,
                in_channels=cond.num_classes,
                out_channels=cond.out_channels,
            )
        case schema.TextCondConfig(encoder=schema.CLIPTextConfig() as encoder):
            if encoder.activation == "gelu":
                layer = open_clip_layer(encoder)
                return _stage("FrozenOpenCLIPEmbedder", freeze=True, layer=layer)
            if encoder.layer != "last":
                raise ValueError(
                    f"layer={encoder.layer!r} of a CLIP with quick_gelu has no option in a CompVis"
                    " YAML"
                )
            return _stage("FrozenCLIPEmbedder", max_length=encoder.max_length)
    encoder = cond.encoder
    if encoder.num_heads * encoder.head_width != HEADS * HEAD_WIDTH:
        raise ValueError(
            f"a BERTEmbedder has {HEADS} heads of width {HEAD_WIDTH}, this encoder"
            f" {encoder.num_heads} of {encoder.head_width}"
        )
    layout = isinstance(cond, schema.LayoutCondConfig)
    return _stage(
        "BERTEmbedder",
        n_embed=encoder.width,
        n_layer=encoder.num_layers,
        vocab_size=encoder.vocab_size,
        max_seq_len=encoder.max_length,
        **({"use_tokenizer": False} if layout else {}),
    )


def _stage(name: str, **params: Any) -> dict[str, Any]:
    return {"target": ENCODERS + name, "params": params}
