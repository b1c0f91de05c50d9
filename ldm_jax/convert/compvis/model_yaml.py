"""The `model` section of a CompVis YAML in our terms, and back.

`target` strings are only compared by their last name: nothing is imported from them.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import yaml
from etils import epath

from ldm_jax import finite, schema
from ldm_jax.convert.compvis import conditions, yaml_options
from ldm_jax.convert.compvis.conditions import SCHEDULES
from ldm_jax.runtime import reading
from ldm_jax.schema import serialize, sizes

MODEL = "ldm.models.diffusion.ddpm."

REQUIRED = ("first_stage_config", "cond_stage_config", "unet_config")
DEFAULTS = {
    "linear_start": 1e-4,
    "linear_end": 2e-2,
    "timesteps": 1000,
    "beta_schedule": "linear",
    "parameterization": "eps",
    "loss_type": "l2",
    "l_simple_weight": 1.0,
    "original_elbo_weight": 0.0,
    "learn_logvar": False,
    "logvar_init": 0.0,
    "scale_factor": 1.0,
    "scale_by_std": False,
    "image_size": 256,
    "concat_mode": True,
    "conditioning_key": None,
    "cond_stage_key": "image",
    "cond_stage_trainable": False,
    "low_scale_config": None,
}
FIXED = {
    "clip_denoised": True,
    "cosine_s": 8e-3,
    "given_betas": None,
    "num_timesteps_cond": 1,
    "use_positional_encodings": False,
}
# Options without an effect on the model's output.
IGNORED = (
    *("channels", "ckpt_path", "ignore_keys", "load_only_unet", "make_it_fit", "use_ema"),
    *("log_every_t", "monitor", "reset_ema", "reset_num_ema_updates", "scheduler_config"),
    *("bbox_key", "concat_keys", "depth_stage_config", "first_stage_key", "low_scale_key"),
    *("masked_image_key", "noise_level_key", "c_concat_log_start", "c_concat_log_end"),
    *("cond_stage_forward", "finetune_keys", "keep_finetune_dims", "ucg_training"),
    *("split_input_params", "v_posterior"),
)


OURS = "ldm_jax"
"""Name of our section in a YAML, and of the text beside the tensors of a file."""
MAX_TEXT = 2**17
"""Largest number of characters of a YAML; published ones have 3000."""
MAX_NODES = 20_000
"""Largest number of values in a YAML, with aliases expanded."""


class _Loader(yaml.SafeLoader):
    """Plain values only, with `1e-4` a number, as OmegaConf reads it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.\d*)?[eE][-+]?\d+$|^[-+]?\.\d+(?:[eE][-+]?\d+)?$"),
    list("-+0123456789."),
)


def read(path: epath.PathLike) -> dict[str, Any]:
    """The file's plain values. ValueError if it is not YAML with a `model` section."""
    path = epath.Path(path)
    text = reading.read_text(path)
    if len(text) > MAX_TEXT:
        raise ValueError(f"{path}: is no config of a model: longer than {MAX_TEXT} characters")
    with reading.refusals(path):
        values = _parsed(text)
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict) or not {"target", "params"} <= set(model):
        raise ValueError(f"{path}: has no `model` section with `target` and `params`")
    return values


def _parsed(text: str) -> Any:
    """Plain values of YAML text. ValueError if it is not YAML, or its aliases expand too far."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None and _written_out(node, {}) > MAX_NODES:
            raise ValueError(f"its aliases stand for more than {MAX_NODES} values")
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML ({error})") from error
    except RecursionError:
        raise ValueError("is nested deeper than any config, or holds itself") from None


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values in a node with aliases expanded. RecursionError for a cycle.

    A merge key (`<<`) copies the mapping it names, and a walk over the values visits an alias each
    time that it is named: nine lines of nine aliases are a billion values.
    """
    if id(node) not in known:
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_written_out(part, known) for part in inner)
    return known[id(node)]


def dumps(config: schema.LatentDiffusionConfig, scale: float) -> str:
    """The YAML of a model: the section that the reference reads, and ours, exact, beside it."""
    ours = serialize.to_dict(config)
    values = {
        "model": model_options(config, scale),
        "ldm_jax": {"format": serialize.FORMAT, "config": ours},
    }
    return yaml.safe_dump(values, sort_keys=False)


def dumps_first_stage(config: schema.LatentDiffusionConfig, scale: float) -> str:
    """`dumps` for a first stage alone; the scale stands in our section of the YAML."""
    section = {"config": serialize.to_dict(config), "scale": float(scale)}
    values = {
        "model": first_stage_options(config.first_stage),
        "ldm_jax": {"format": serialize.FORMAT, **section},
    }
    return yaml.safe_dump(values, sort_keys=False)


def metadata(config: schema.LatentDiffusionConfig, scale: float) -> dict[str, str]:
    """{name: JSON} that tells the model of a file without its YAML, beside the file's tensors."""
    values = {"format": serialize.FORMAT, "config": serialize.to_dict(config), "scale": scale}
    return {OURS: json.dumps(values)}


def of_metadata(
    texts: Mapping[str, str], path: epath.PathLike
) -> tuple[schema.LatentDiffusionConfig, float] | None:
    """Inverse of `metadata`; None if the file has none, or of a newer version."""
    if OURS not in texts:
        return None
    remedy = "give its YAML (--config)"
    with reading.refusals(path, remedy):
        if len(texts[OURS]) > MAX_TEXT:
            raise ValueError(f"{OURS} is longer than {MAX_TEXT} characters")
        values = reading.parse_json(texts[OURS], f"{os.fspath(path)}: {OURS}", remedy)
        if values["format"] > serialize.FORMAT:
            return None
        config = serialize.from_dict(values["config"], f"{OURS}.config")
        if not isinstance(config, schema.LatentDiffusionConfig):
            raise ValueError(f"{OURS} has no config of a model")
        sizes.check(config, "model")
        return config, finite.checked(values["scale"], f"{OURS}.scale", nonzero=True)


def first_stage_options(config: schema.FirstStageModelConfig) -> dict[str, Any]:
    """The `model` section of a first stage's own YAML."""
    name = "VQModel" if isinstance(config, schema.AutoencoderVQConfig) else "AutoencoderKL"
    params = yaml_options.first_stage_options(config)
    return {"target": f"ldm.models.autoencoder.{name}", "params": params}


def first_stage_of(values: Mapping[str, Any]) -> schema.FirstStageModelConfig:
    """The first stage in a YAML of its own (`AutoencoderKL`, `VQModel`) or of a whole model."""
    return first_stage_alone_of(values)[0].first_stage


def first_stage_alone_of(
    values: Mapping[str, Any],
) -> tuple[schema.LatentDiffusionConfig, float]:
    """(config without a UNet, latent scale) of the first stage in a YAML, as `config_of`.

    A YAML of the reference does not say the scale of a first stage alone: it is 1.
    """
    params = conditions.params_of(values["model"])
    if "first_stage_config" in params:
        params = conditions.params_of(params["first_stage_config"])
    config = schema.LatentDiffusionConfig(yaml_options.first_stage_config(params), unet=None)
    ours = values.get("ldm_jax")
    if isinstance(ours, dict) and ours.get("format", 0) <= serialize.FORMAT and "scale" in ours:
        exact = serialize.from_dict(ours.get("config"), "ldm_jax.config")
        if first_stage_options(exact.first_stage) == values["model"]:
            return exact, float(ours["scale"])
    return config, 1.0


def config_of(
    values: Mapping[str, Any], shapes: Mapping[str, tuple] | None = None
) -> tuple[schema.LatentDiffusionConfig, float | None, tuple[str, ...]]:
    """From a YAML: (config, latent scale or None for "in the checkpoint", guesses).

    values: as `read` gives them; the section that `dumps` adds is used as long as it agrees with
    the
        reference's section.
    shapes: the checkpoint's names -> shapes, which give the sizes of a CLIP text encoder.
    Raises ValueError for options that are unknown or not supported.
    """
    config, scale, guesses = model_config(values["model"], shapes or {})
    ours = values.get("ldm_jax")
    if isinstance(ours, dict) and ours.get("format", 0) <= serialize.FORMAT:
        exact = serialize.from_dict(ours.get("config"), "ldm_jax.config")
        written = model_options(exact, 1.0 if scale is None else scale)
        if values["model"] in (written, conditions.with_layer_of_file(written, exact)):
            return exact, scale, ()
    return config, scale, guesses


def model_config(
    model: Mapping[str, Any], shapes: Mapping[str, tuple]
) -> tuple[schema.LatentDiffusionConfig, float | None, tuple[str, ...]]:
    """`config_of` for the section of the reference alone."""
    kind = str(model["target"]).rpartition(".")[2]
    if kind not in conditions.KINDS:
        known = ", ".join(conditions.KINDS)
        raise ValueError(f"model.target {model['target']!r} is not one of {known}")
    values = yaml_options.read(
        model["params"], "model", required=REQUIRED, optional=DEFAULTS, fixed=FIXED, ignored=IGNORED
    )
    unet = yaml_options.unet_config(conditions.params_of(values["unet_config"]))
    if unet.linear_projection:
        # Stable Diffusion 2.1 overflows without; in the reference, ATTN_PRECISION sets it
        unet = dataclasses.replace(unet, upcast_attention=True)
    first_stage = yaml_options.first_stage_config(
        conditions.params_of(values["first_stage_config"]), channels=unet.out_channels
    )
    guesses: list[str] = []
    cond = conditions.cond_config(kind, values, unet, first_stage, shapes, guesses)
    side = values["image_size"]
    side = side[0] if isinstance(side, (list, tuple)) else side
    config = schema.LatentDiffusionConfig(
        first_stage, unet, cond, _diffusion(values), side * first_stage.downsample
    )
    return config, None if values["scale_by_std"] else float(values["scale_factor"]), (*guesses,)


def model_options(config: schema.LatentDiffusionConfig, scale: float) -> dict[str, Any]:
    """Inverse of `model_config`: the `model` section that the reference builds the model from.

    Options that only change training (min_snr_gamma, offset noise, dropped conditions) are left
    out, and zero_terminal_snr, which the reference lacks: our own section and the tensor `ztsnr`
    hold it. ValueError for a model that the reference has no option for.
    """
    kind, cond = conditions.cond_options(config)
    side = config.size // config.first_stage.downsample
    noise = config.diffusion
    values = {
        "linear_start": noise.beta_start,
        "linear_end": noise.beta_end,
        "timesteps": noise.timesteps,
        "beta_schedule": {ours: theirs for theirs, ours in SCHEDULES.items()}[noise.schedule],
        "parameterization": noise.prediction,
        "loss_type": noise.loss,
        "l_simple_weight": noise.simple_weight,
        "original_elbo_weight": noise.elbo_weight,
        "learn_logvar": noise.learn_logvar,
        "logvar_init": noise.logvar_init,
        "scale_factor": float(scale),
    }
    stage = {
        "target": yaml_options.first_stage_target(config.first_stage),
        "params": yaml_options.first_stage_options(config.first_stage),
    }
    unet = {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": yaml_options.unet_options(config.unet, side),
    }
    params = {
        **{name: x for name, x in values.items() if x != DEFAULTS[name] and x is not None},
        "first_stage_key": "image",
        "image_size": side,
        "channels": config.first_stage.embed_dim,
        "use_ema": False,
        **cond,
        "unet_config": unet,
        "first_stage_config": stage,
    }
    return {"target": MODEL + kind, "params": params}


def _diffusion(values: Mapping[str, Any]) -> schema.DiffusionConfig:
    schedule, prediction = values["beta_schedule"], values["parameterization"]
    if schedule not in SCHEDULES:
        raise ValueError(f"model: beta_schedule={schedule!r} is not one of {', '.join(SCHEDULES)}")
    if prediction not in ("eps", "x0", "v"):
        raise ValueError(f"model: parameterization={prediction!r} is not one of eps, x0, v")
    betas = schedule != "cosine"
    return schema.DiffusionConfig(
        schedule=SCHEDULES[schedule],
        timesteps=values["timesteps"],
        beta_start=float(values["linear_start"]) if betas else None,
        beta_end=float(values["linear_end"]) if betas else None,
        prediction=prediction,
        loss=values["loss_type"],
        simple_weight=float(values["l_simple_weight"]),
        elbo_weight=float(values["original_elbo_weight"]),
        learn_logvar=values["learn_logvar"],
        logvar_init=float(values["logvar_init"]),
    )
