"""Models in folders of diffusers: `model_index.json` and a subfolder for each component.

Components are found by their names, not by the pipeline's class: a UNet, a first stage (`vae` or
`vqvae`), a text encoder (`text_encoder` or `bert`) with its tokenizer, and a scheduler. Other
components (safety checker, depth estimator, ...) take no part in sampling and are ignored.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ldm_jax import bundle, schema
from ldm_jax.convert import table
from ldm_jax.convert.diffusers import components, part_configs, scheduler_config
from ldm_jax.convert.diffusers.components import TextConfig, read_json
from ldm_jax.convert.diffusers.unet_config import unet_config
from ldm_jax.convert.diffusers.writer import INDEX, INPAINT, UPSCALE_SCALE
from ldm_jax.data import tokens
from ldm_jax.runtime import checkpoint
from ldm_jax.runtime.log import LOG

READ = ("unet", "vae", "vqvae", "text_encoder", "bert", "tokenizer", "scheduler")
READ += ("low_res_scheduler",)
LEFT = ("safety_checker", "feature_extractor", "image_encoder", "depth_estimator", "watermarker")


def load(
    folder: epath.PathLike,
    *,
    variant: str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    shapes_only: bool = False,
) -> bundle.LatentDiffusion:
    """The model of a pipeline's folder, with its tokenizer.

    variant: `fp16` for files named so; a component without such a file gives its plain one.
    dtype: compute type. param_dtype: of the parameters, which are placed one by one, by the rules
    of training on `mesh` or on the default device.
    shapes_only: the parameters are ShapeDtypeStructs, and no weight is read.
    Raises ValueError or FileNotFoundError that name the file and its fault: an option
    or a component that is not supported, tensors that do not fit, missing weights.
    """
    folder = checkpoint.absolute(folder)
    index = _index(folder)
    names = _names(index)
    config, scale = _config(folder, index)
    bundle.check(config, config.first_stage.in_channels)
    components.check_variant([folder / name for name in names.values()], variant)
    params = {}
    for kind, part in components.model_parts(config).items():
        if kind in names:
            place = None if shapes_only else table.placer(part.shapes, mesh)
            path = folder / names[kind]
            params[kind] = components.params(path, part, variant, param_dtype, place, shapes_only)
        else:
            params[kind] = {}
    model = bundle.build(
        config,
        params,
        scale,
        dtype=dtype,
        **bundle.kernels(mesh),
    )
    text = schema.text_of(config.cond)
    if text is None or "tokenizer" not in index.components:
        return model
    return dataclasses.replace(model, tokenizer=_tokenizer(folder / "tokenizer", text.encoder))


def load_unet(
    folder: epath.PathLike, *, variant: str | None = None, param_dtype: Any = np.float32
) -> tuple[dict, schema.UNetConfig]:
    """(host parameters, config) of a UNet: of its own folder, or of a pipeline's."""
    folder = _component(folder, "unet")
    config = _unet(folder)
    part = components.unet_part(config)
    return components.params(folder, part, variant, param_dtype), config


def load_first_stage(
    folder: epath.PathLike, *, variant: str | None = None, param_dtype: Any = np.float32
) -> tuple[dict, schema.FirstStageModelConfig]:
    """(host parameters, config) of a first stage: of its own folder, or of a pipeline's.

    Its scale is `first_stage_scale`.
    """
    folder = _component(folder, "first_stage")
    config, _ = _first_stage(folder)
    part = components.first_stage_part(config)
    return components.params(folder, part, variant, param_dtype), config


def first_stage_scale(folder: epath.PathLike) -> float:
    """`scaling_factor` of a first stage: of its own folder, or of a pipeline's."""
    options = read_json(_component(folder, "first_stage") / "config.json")
    return float(options.get("scaling_factor", part_configs.KL_DEFAULTS["scaling_factor"]))


def first_stage_size(folder: epath.PathLike) -> int:
    """Side in pixels of the images that a first stage was trained on, as far as it says."""
    options = read_json(_component(folder, "first_stage") / "config.json")
    size, levels = options.get("sample_size"), len(options.get("block_out_channels", [0]))
    fits = type(size) is int and 0 < size <= 2**16 and size % 2 ** (levels - 1) == 0
    return size if fits else 256


def sole_variant(folder: epath.PathLike, kind: str) -> str | None:
    """The only variant of a component's weights, taken when no variant is asked for; else None.

    kind: our name of the part, as in `LatentDiffusion.params`.
    """
    folder = _component(folder, kind)
    others = components.variants(folder)
    if len(others) != 1 or any((folder / name).exists() for name in components.names(None)):
        return None
    LOG.info(f"{folder}: takes the variant {others[0]}, the only weights that are there")
    return others[0]


def is_first_stage(folder: epath.Path) -> bool:
    """Tell whether a folder is that of a first stage alone."""
    if not (folder / "config.json").exists():
        return False
    try:
        name = part_configs.class_name(read_json(folder / "config.json"))
        return name in part_configs.FIRST_STAGE_CLASSES
    except ValueError:
        return False


def load_text_encoder(
    folder: epath.PathLike, *, variant: str | None = None, param_dtype: Any = np.float32
) -> tuple[dict, TextConfig]:
    """(host parameters, config) of a text encoder: of its own folder, or of a pipeline's."""
    folder = _component(folder, "cond_stage")
    config = _text(folder)
    part = components.text_part(config)
    return components.params(folder, part, variant, param_dtype), config


# --- parts of a folder --------------------------------------------------------------------------


class Index(NamedTuple):
    """`model_index.json`: the pipeline's class, names of its components, its other options."""

    pipeline: str
    components: tuple[str, ...]
    options: dict[str, Any]


def _index(folder: epath.Path) -> Index:
    path = folder / INDEX
    content = read_json(path)
    named = {k: v for k, v in content.items() if isinstance(v, list) and not k.startswith("_")}
    present = tuple(k for k, v in named.items() if v and v[-1] is not None)
    unknown = [f"{k}={named[k]}" for k in present if k not in (*READ, *LEFT)]
    if unknown or "unet" not in present or "scheduler" not in present:
        what = f"not supported: {', '.join(unknown)}"
        what = what if unknown else "it needs the components unet and scheduler"
        raise ValueError(f"{path}: {content.get('_class_name')}: {what}")
    options = {k: v for k, v in content.items() if k not in named}
    return Index(part_configs.class_name(content), present, options)


def _names(index: Index) -> dict[str, str]:
    """Our part -> its component."""
    kinds = {
        "unet": ("unet",),
        "first_stage": ("vae", "vqvae"),
        "cond_stage": ("text_encoder", "bert"),
    }
    return {
        kind: name for kind, names in kinds.items() for name in names if name in index.components
    }


def _component(folder: epath.PathLike, kind: str) -> epath.Path:
    """The folder of a component: `folder` itself, or that of the pipeline `folder`."""
    folder = checkpoint.absolute(folder)
    if not (folder / INDEX).exists():
        return folder
    names = _names(_index(folder))
    if kind not in names:
        raise ValueError(f"{folder}: has no {kind}, but {', '.join(names.values())}")
    return folder / names[kind]


def _config(folder: epath.Path, index: Index) -> tuple[schema.LatentDiffusionConfig, float]:
    """Config of the model, and its latent scale."""
    names = _names(index)
    net = _unet(folder / "unet")
    first, scale = schema.IdentityFirstStageConfig(net.out_channels), 1.0
    if "first_stage" in names:
        first, scale = _first_stage(folder / names["first_stage"])
    text = _text(folder / names["cond_stage"]) if "cond_stage" in names else None
    cond = _cond(folder, index, net, first, text)
    if isinstance(getattr(cond, "concat", None), schema.UpscaleCondConfig):
        scale = UPSCALE_SCALE
    elif index.pipeline == "LDMSuperResolutionPipeline":
        scale = 1.0  # this pipeline ignores the factor
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_json(path)
    if left := scheduler_config.left_out(scheduler, index.pipeline):
        LOG.warning(
            f"{path}: pictures differ a little from diffusers', for these are not followed:"
            f" {', '.join(left)}"
        )
    if not scheduler_config.is_known(scheduler):
        name = part_configs.class_name(scheduler)
        LOG.info(f"{path}: {name} is no solver of ours: its noise schedule is taken; see --solver")
    return schema.LatentDiffusionConfig(
        first_stage=first,
        unet=net,
        cond=cond,
        diffusion=scheduler_config.diffusion_config(scheduler, str(path)),
        size=_side(folder / "unet") * first.downsample,
        sampling=scheduler_config.sampling_config(scheduler, index.pipeline, str(path)),
    ), scale


def _cond(
    folder: epath.Path,
    index: Index,
    net: schema.UNetConfig,
    first: schema.FirstStageModelConfig,
    text: TextConfig | None,
) -> schema.CondConfig:
    """The conditioning, by the text encoder and the UNet's inputs beside the latent."""
    z = first.embed_dim
    extra = net.in_channels - z
    labelled = net.num_classes is not None or net.vector_dim is not None
    if text is None and net.context_dim is None and not labelled:
        if extra == 0:
            return None
        if extra == first.in_channels:
            return schema.SuperResCondConfig(factor=first.downsample)
    if text is not None:
        trainable = isinstance(text, schema.BERTTextConfig)
        cond = schema.TextCondConfig(encoder=text, trainable=trainable)
        upscales = net.num_classes is not None and "low_res_scheduler" in index.components
        if upscales and extra == first.in_channels:
            path = folder / "low_res_scheduler" / "scheduler_config.json"
            most = index.options.get("max_noise_level", 350)
            beside = scheduler_config.upscale_config(
                read_json(path), first.downsample, most, str(path)
            )
            return schema.HybridCondConfig(cond, beside)
        if not labelled and extra == 0:
            return cond
        if not labelled and extra in (1, z + 1):
            beside = schema.DepthCondConfig() if extra == 1 else INPAINT
            return schema.HybridCondConfig(cond, beside)
    raise ValueError(
        f"{folder}: {index.pipeline} with a UNet of in_channels={net.in_channels},"
        f" cross_attention_dim={net.context_dim}, num_class_embeds={net.num_classes} and class"
        f" vectors of {net.vector_dim}, on latents of {z} channels,"
        f" {'without' if text is None else 'with'} text encoder: this is no conditioning we know"
    )


def _unet(folder: epath.Path) -> schema.UNetConfig:
    path = folder / "config.json"
    return unet_config(read_json(path), str(path))


def _side(folder: epath.Path) -> int:
    """Side of the latents that a UNet was trained on, the longer one."""
    side = read_json(folder / "config.json").get("sample_size") or 64
    sides = side if isinstance(side, list) and side else [side]
    if any(type(n) is not int or not 0 < n <= 2**16 for n in sides):
        raise ValueError(f"{folder}/config.json: sample_size={side!r:.200} is no size")
    return max(sides)


def _first_stage(folder: epath.Path) -> tuple[schema.FirstStageModelConfig, float]:
    path = folder / "config.json"
    return part_configs.first_stage_config(read_json(path), str(path))


def _text(folder: epath.Path) -> TextConfig:
    path = folder / "config.json"
    return part_configs.text_config(read_json(path), str(path))


def _tokenizer(folder: epath.Path, encoder: TextConfig) -> tokens.Tokenizer:
    """The tokenizer, with its own number of ids, at most the encoder's `max_length`."""
    path = folder / "tokenizer_config.json"
    most = read_json(path).get("model_max_length") if path.exists() else None
    length = min(encoder.max_length, most) if isinstance(most, int) else encoder.max_length
    return tokens.load_tokenizer(folder, length)
