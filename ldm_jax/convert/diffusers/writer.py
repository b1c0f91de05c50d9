"""A model as a folder that diffusers loads: every component with its config, and the index."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from etils import epath

from ldm_jax import bundle, conditioning, schema
from ldm_jax.convert import table, text_tables
from ldm_jax.convert.diffusers import components, part_configs, scheduler_config
from ldm_jax.convert.diffusers.unet_config import unet_options
from ldm_jax.convert.formats import safetensors_file as safetensors
from ldm_jax.data import tokens
from ldm_jax.runtime import checkpoint

INDEX = "model_index.json"
# Readers recognise old folders by it; from 0.9 on they take sizes as written.
VERSION = {"_diffusers_version": "0.39.0"}
WEIGHTS = {"diffusers": "diffusion_pytorch_model.safetensors", "text": "model.safetensors"}

INPAINT = schema.InpaintCondConfig(order="mask_image", mask_range=(0.0, 1.0), fill=0.0)
# The upscaling pipeline divides by this, whatever the folder says.
UPSCALE_SCALE = 0.08333
UNCHECKED = ("safety_checker", "feature_extractor")


class Pipeline(NamedTuple):
    """A pipeline of diffusers: its names of the parts, and the parts that may be absent."""

    name: str
    first_stage: str | None = "vae"
    text: str | None = "text_encoder"
    absent: tuple[str, ...] = ()
    options: Mapping[str, Any] = {}


def save(
    model: bundle.LatentDiffusion,
    folder: epath.PathLike,
    *,
    dtype: Any = None,
    tokenizer: tokens.Tokenizer | None = None,
) -> None:
    """Writes the folder of the pipeline that samples this model, which must not be there yet.

    For a first stage alone it is the folder of the component.

    dtype: of the weights; None keeps that of the parameters.
    tokenizer: for a model of text that has none. The text encoder of Stable Diffusion 2 is written
    without its last layer, which is never read, as diffusers has it. A depth estimator is not part
    of the model, so the depth pipeline of diffusers wants one when it loads the folder
    (`depth_estimator=...`). ValueError for a model that no pipeline of diffusers can hold;
    FileExistsError if the folder is not empty.
    """
    folder = checkpoint.absolute(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: is there already and not empty; choose another name")
    if model.config.unet is None:
        _save_first_stage(model, folder, dtype)
        return
    config, params = text_tables.without_unread_layer(model.config, model.params)
    pipeline, options = _pipeline(config, model.latent_scale), _options(config, model.latent_scale)
    text, tokenizer = schema.text_of(config.cond), tokenizer or model.tokenizer
    _check_tokenizer(text, tokenizer, str(folder))
    written = _written(pipeline)
    for kind, tensors in _tensors(config, params, written, dtype).items():
        name = written[kind]
        _write_json(folder / name / "config.json", options[kind])
        path = folder / name / WEIGHTS["text" if kind == "cond_stage" else "diffusers"]
        safetensors.write(path, tensors, {"format": "pt"})
    index = {name: _library(kind, options[kind]) for kind, name in written.items()}
    for name, content in _schedulers(config).items():
        _write_json(folder / name / "scheduler_config.json", content)
        index[name] = ["diffusers", content["_class_name"]]
    if text is not None:
        index["tokenizer"] = ["transformers", _write_tokenizer(folder / "tokenizer", tokenizer)]
    index |= {name: [None, None] for name in pipeline.absent} | dict(pipeline.options)
    # last: without it, a folder that was left incomplete is not taken for a model
    _write_json(folder / INDEX, {"_class_name": pipeline.name, **VERSION, **index})


def _save_first_stage(model: bundle.LatentDiffusion, folder: epath.Path, dtype: Any) -> None:
    """Write the folder of a first stage alone: config.json and weights."""
    options, tensors = _first_stage(model, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.write(folder / WEIGHTS["diffusers"], tensors, {"format": "pt"})
    _write_json(folder / "config.json", options)  # last, as the index below


def _first_stage(
    model: bundle.LatentDiffusion, dtype: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json, tensors) of a first stage."""
    config = model.config.first_stage
    options = part_configs.first_stage_options(config, model.latent_scale, model.config.size)
    entries = components.first_stage_part(config).entries(None)
    params = model.params["first_stage"]
    return VERSION | options, table.to_torch(entries, params, dtype=dtype, lazy=True)


def check(model: bundle.LatentDiffusion) -> int:
    """Number of tensors that `save` would write; ValueError as there. The parameters may be
    shapes."""
    if model.config.unet is None:
        return len(_first_stage(model, None)[1])
    config, params = text_tables.without_unread_layer(model.config, model.params)
    pipeline = _pipeline(config, model.latent_scale)
    _options(config, model.latent_scale)
    _check_tokenizer(schema.text_of(config.cond), model.tokenizer, pipeline.name)
    tensors_by_part = _tensors(config, params, _written(pipeline), None)
    return sum(len(tensors) for tensors in tensors_by_part.values())


def _check_tokenizer(text: Any, tokenizer: tokens.Tokenizer | None, where: str) -> None:
    if text is not None and not isinstance(tokenizer, tokens.FileTokenizer):
        raise ValueError(
            f"{where}: a tokenizer of CLIP or BERT is needed, and the model has"
            f" {'none' if tokenizer is None else 'one of bytes'}: give one"
        )


def _tensors(
    config: schema.LatentDiffusionConfig, params: dict, kinds: Iterable[str], dtype: Any
) -> dict[str, dict[str, Any]]:
    """Names and tensors of each part that is written."""
    parts = components.model_parts(config)
    return {
        kind: table.to_torch(parts[kind].entries(None), params[kind], dtype=dtype, lazy=True)
        for kind in kinds
    }


def _pipeline(config: schema.LatentDiffusionConfig, scale: float) -> Pipeline:
    """The pipeline for this model; ValueError if there is none."""
    first, cond = config.first_stage, config.cond
    kl = isinstance(first, schema.AutoencoderKLConfig)
    stable = kl and isinstance(
        getattr(schema.text_of(cond), "encoder", None), schema.CLIPTextConfig
    )
    match cond:
        case None if isinstance(first, schema.IdentityFirstStageConfig):
            return Pipeline("DDIMPipeline", None, None)
        case None:
            return Pipeline("LDMPipeline", "vqvae", None)
        case schema.SuperResCondConfig():
            if scale != 1:
                raise ValueError(
                    f"latent_scale={scale}: LDMSuperResolutionPipeline of diffusers has 1 only"
                )
            return Pipeline("LDMSuperResolutionPipeline", "vqvae", None)
        case schema.TextCondConfig() if not stable:
            return Pipeline("LDMTextToImagePipeline", "vqvae", "bert")
        case schema.TextCondConfig():
            return Pipeline(
                "StableDiffusionPipeline",
                absent=(*UNCHECKED, "image_encoder"),
                options={"requires_safety_checker": False},
            )
        case schema.HybridCondConfig() if stable and cond.concat == INPAINT:
            return Pipeline(
                "StableDiffusionInpaintPipeline",
                absent=(*UNCHECKED, "image_encoder"),
                options={"requires_safety_checker": False},
            )
        case schema.HybridCondConfig(concat=schema.DepthCondConfig()) if stable:
            return Pipeline(
                "StableDiffusionDepth2ImgPipeline", absent=("depth_estimator", "feature_extractor")
            )
        case schema.HybridCondConfig(concat=schema.UpscaleCondConfig()) if stable:
            if scale != UPSCALE_SCALE:
                raise ValueError(
                    f"latent_scale={scale}: StableDiffusionUpscalePipeline of diffusers has"
                    f" {UPSCALE_SCALE} only"
                )
            return Pipeline(
                "StableDiffusionUpscalePipeline",
                absent=(*UNCHECKED, "watermarker"),
                options={"max_noise_level": cond.concat.max_noise_level},
            )
    kinds = {schema.AutoencoderKLConfig: "a KL", schema.AutoencoderVQConfig: "a VQ"}
    raise ValueError(
        f"no pipeline of diffusers has {conditioning.name_of(cond)} on"
        f" {kinds.get(type(first), 'no')} first stage with the options of this one"
    )


def _written(pipeline: Pipeline) -> dict[str, str]:
    """Our part -> the pipeline's name for it, of those that it has."""
    names = {"unet": "unet", "first_stage": pipeline.first_stage, "cond_stage": pipeline.text}
    return {kind: name for kind, name in names.items() if name is not None}


def _options(config: schema.LatentDiffusionConfig, scale: float) -> dict[str, dict[str, Any]]:
    """`config.json` of each part."""
    first, text = config.first_stage, schema.text_of(config.cond)
    options_by_part = {"unet": VERSION | unet_options(config.unet, config.size // first.downsample)}
    if not isinstance(first, schema.IdentityFirstStageConfig):
        options = part_configs.first_stage_options(first, scale, config.size)
        options_by_part["first_stage"] = VERSION | options
    if text is not None:
        options_by_part["cond_stage"] = part_configs.text_options(text.encoder)
    return options_by_part


def _library(kind: str, options: dict[str, Any]) -> list[str]:
    """The index's entry for a component."""
    if kind != "cond_stage":
        return ["diffusers", options["_class_name"]]
    name = options["architectures"][0]
    return ["latent_diffusion" if name == "LDMBertModel" else "transformers", name]


def _schedulers(config: schema.LatentDiffusionConfig) -> dict[str, dict[str, Any]]:
    options = scheduler_config.scheduler_options(config.diffusion, config.sampling)
    schedulers = {"scheduler": options}
    beside = getattr(config.cond, "concat", None)
    if isinstance(beside, schema.UpscaleCondConfig):
        schedulers["low_res_scheduler"] = scheduler_config.low_res_scheduler_options(beside)
    return {name: VERSION | content for name, content in schedulers.items()}


def _write_tokenizer(folder: epath.Path, tokenizer: tokens.FileTokenizer) -> str:
    """Write the tokenizer, its config with the length of texts; returns its class."""
    tokenizer.save(folder)
    path = folder / tokens.CONFIG
    content = components.read_json(path) if path.exists() else {}
    kind = "BertTokenizer" if (folder / "vocab.txt").exists() else "CLIPTokenizer"
    content = {"tokenizer_class": kind, **content, "model_max_length": tokenizer.max_length}
    _write_json(path, content)
    return content["tokenizer_class"].removesuffix("Fast")


def _write_json(path: epath.Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
