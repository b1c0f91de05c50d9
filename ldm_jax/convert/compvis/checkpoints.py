"""Models of CompVis/latent-diffusion and Stable Diffusion: checkpoints into models, and back."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ldm_jax import bundle, conditioning, finite, schema
from ldm_jax.convert import table, text_tables
from ldm_jax.convert.compvis import conditions, model_yaml, single_file, spellings, tables
from ldm_jax.convert.compvis.yaml_options import first_stage_config, unet_config
from ldm_jax.convert.formats import files, safetensors_file, torch_writer
from ldm_jax.models import autoencoder, unet
from ldm_jax.models.autoencoder import FirstStage
from ldm_jax.models.unet import UNet
from ldm_jax.runtime import reading
from ldm_jax.runtime.log import LOG
from ldm_jax.schema import serialize, sizes

StateDict = Mapping[str, Any]  # torch name -> NumPy array, ShapeDtypeStruct or lazy tensor

UNET_PREFIX = single_file.UNET
FIRST_STAGE_PREFIX = single_file.FIRST_STAGE
COND_STAGE_PREFIX = single_file.COND_STAGE
EMA_PREFIX = "model_ema."

IGNORED = (
    (
        "schedule buffers",
        r"(low_scale_model\.)?(betas|alphas_cumprod(_prev)?|sqrt_alphas_cumprod"
        r"|sqrt_one_minus_alphas_cumprod|log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod"
        r"|sqrt_recipm1_alphas_cumprod|posterior_variance|posterior_log_variance_clipped"
        r"|posterior_mean_coef[12]|lvlb_weights)",
    ),
    ("log-variances of the training loss", r"logvar"),
    ("losses of the first stage", r"(first_stage_model\.)?loss\..+"),
    ("bookkeeping of the moving average", r"model_ema\.(decay|num_updates)"),
    ("position ids", r"cond_stage_model\.(.+\.)?position_ids"),
    (
        "parts of CLIP beside the text encoder",
        r"cond_stage_model\.(model\.)?(text_projection|logit_scale|attn_mask|visual\..+)"
        r"|cond_stage_model\.transformer\.text_projection\.weight",
    ),
    ("depth estimator", r"depth_model\..+"),
    ("averaged weights of another part than the UNet", r"(first|cond)_stage_model\.model_ema\..+"),
)
"""Tensors of a whole checkpoint that the model does not need: (content, pattern of names).

Besides these: the copy that is not taken of the UNet's raw and averaged weights, and a second copy
of the first stage under `cond_stage_model.` (inpainting_big)."""

TRANSFORMERS_TEXT = COND_STAGE_PREFIX + "transformer.text_model."
TEXT_ENCODERS = (
    r"cond_stage_model\.model\.(token_embedding|positional_embedding|transformer|ln_final)\b",
    r"cond_stage_model\.transformer\.text_model\.",
)
"""Names of OpenCLIP's and of OpenAI's text encoder, of which some files hold both."""


# --- one part: names with that part's prefix on all of them or on none ---------------------------


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
    return model, table.from_torch(tables.unet(model), tensors, _unet_shapes(model))


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
    return model, table.from_torch(tables.autoencoder(model), tensors, _first_stage_shapes(model))


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
    tensors = {key: x for key, x in tensors.items() if not _ignored(COND_STAGE_PREFIX + key)}
    params = table.from_torch(text_tables.cond_stage(cond), tensors, _cond_shapes(cond, model))
    return model, params


def cond_stage_state_dict(config: schema.CondConfig, params: dict) -> dict[str, Any]:
    """Inverse of `load_cond_stage`: CompVis name, without a prefix, -> NumPy array."""
    return table.to_torch(text_tables.cond_stage(config), params)


def _without_prefix(state_dict: StateDict, prefix: str) -> StateDict:
    if all(name.startswith(prefix) for name in state_dict):
        return {name.removeprefix(prefix): x for name, x in state_dict.items()}
    return state_dict


def _unet_shapes(model: UNet) -> dict:
    return jax.eval_shape(model.init, jax.random.key(0), *unet.example_inputs(model))["params"]


def _first_stage_shapes(model: FirstStage) -> dict:
    inputs = autoencoder.example_inputs(model)
    # the identity has no parameters at all
    return jax.eval_shape(model.init, jax.random.key(0), *inputs).get("params", {})


def _cond_shapes(cond: schema.CondConfig, model: Any) -> dict:
    return jax.eval_shape(lambda key: conditioning.init(cond, model, key), jax.random.key(0))


# --- whole models --------------------------------------------------------------------------------


def load(
    path: epath.PathLike,
    yaml_path: epath.PathLike | None = None,
    *,
    variant: str | None = None,
    ema: bool = True,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    shapes_only: bool = False,
) -> bundle.LatentDiffusion:
    """The model of a checkpoint, without a tokenizer, which no checkpoint holds.

    path: a file that `files.open_state_dict` reads.
        It may hold a first stage alone.
    yaml_path: its YAML; None for a single file of Stable Diffusion, recognised by its names and
        shapes; the rest is guessed and printed, and `variant` ("v2", "v2-v") overrides guesses.
    ema: take the averaged weights where there are both.
    dtype, param_dtype: of computation and of the parameters.
    mesh: places the parameters by the training rules; None: on the default device.
    shapes_only: the parameters are ShapeDtypeStructs, and no weight is read.
    Raises ValueError that names the file for tensors that are unknown, missing or of another shape.
    Tensors left unread (see `IGNORED`) are counted and printed.
    """
    path = epath.Path(path)
    state_dict, info = files.open_state_dict(path)
    tensors, said = spellings.common(state_dict)
    tensors, marked = spellings.markers(tensors, info.metadata)
    for line in said:
        LOG.info(f"{path.name}: {line}")
    if is_first_stage_alone(tensors):
        return _load_first_stage_alone(
            path, tensors, info, yaml_path, ema, dtype, param_dtype, mesh, shapes_only
        )
    config, scale = _config(path, yaml_path, variant, tensors, marked)
    model = bundle.build(
        config,
        {},
        _take_scale(path, scale, tensors),
        dtype=jnp.dtype(dtype),
        **bundle.kernels(mesh),
    )
    entries, shapes = model_entries(model), model_shapes(model)
    taken = _taken(path, tensors, info, entries, ema)
    place = table.placer(shapes, mesh)
    if shapes_only:
        taken, place = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), taken), None
    params = table.from_torch(
        entries, taken, shapes, dtype=param_dtype, place=place, where=str(path)
    )
    return dataclasses.replace(model, params={part: params.get(part, {}) for part in shapes})


def save(model: bundle.LatentDiffusion, path: epath.PathLike, *, dtype: Any = None) -> None:
    """Writes the weights with CompVis names, and NAME.yaml beside them, which `load` reads.

    path: NAME.safetensors, or NAME.ckpt for programs that read nothing else.
    dtype: of the weights; None keeps that of the parameters. ValueError for another ending, and for
    options that a CompVis YAML lacks.
    """
    path = epath.Path(path)
    if path.suffix not in (".safetensors", ".ckpt"):
        raise ValueError(f"{path}: is written as .safetensors or .ckpt: name it so")
    model = as_written(model)
    text = yaml_text(model)
    tensors = table.to_torch(model_entries(model), model.params, dtype=dtype, lazy=True)
    if model.prediction == "v" and any(name.startswith(TRANSFORMERS_TEXT) for name in tensors):
        tensors["v_pred"] = np.zeros(0, np.float32)  # as other programs mark version 1 with v
    if path.suffix == ".ckpt":
        torch_writer.write(path, tensors)
    else:
        safetensors_file.write(path, tensors, {"format": "pt", **_metadata(model)})
    path.with_suffix(".yaml").write_text(text)


def _metadata(model: bundle.LatentDiffusion) -> dict[str, str]:
    """Metadata, by Stability's specification, that tell what names and shapes of a file do not."""
    kind = {"eps": "epsilon", "v": "v"}.get(model.prediction)
    return {} if model.unet is None or kind is None else {"modelspec.prediction_type": kind}


def as_written(model: bundle.LatentDiffusion) -> bundle.LatentDiffusion:
    """The model whose text encoder a file shows: a penultimate layer of an odd number is the last.

    (`single_file.open_clip_text_config` takes an odd number of OpenCLIP's blocks for all but one.)
    """
    text = schema.text_of(model.config.cond)
    activation = None if text is None else getattr(text.encoder, "activation", None)
    if activation != "gelu" or text.encoder.num_layers % 2 == 0:
        return model
    config, params = text_tables.without_unread_layer(model.config, model.params)
    return dataclasses.replace(model, config=config, params=params)


def load_first_stage_file(
    path: epath.PathLike, yaml_path: epath.PathLike | None = None, *, ema: bool = True
) -> tuple[dict, schema.FirstStageModelConfig]:
    """(host parameters, config) of a first stage: its own checkpoint, or that within a model's.

    yaml_path: the YAML of the first stage or of the model; None: from names and shapes.
    """
    path = epath.Path(path)
    state_dict, info = files.open_state_dict(path)
    tensors, _ = spellings.common(state_dict)
    config, _ = _first_stage_config(path, yaml_path, tensors)
    first_stage = config.first_stage
    return _first_stage_params(path, tensors, info, first_stage, ema), first_stage


def is_first_stage_alone(tensors: StateDict) -> bool:
    """Tell whether a state dict has a first stage, but neither a UNet nor a conditioning stage."""
    others = (UNET_PREFIX, COND_STAGE_PREFIX, ema_name(UNET_PREFIX))
    known = ("encoder.conv_in.weight", FIRST_STAGE_PREFIX + "encoder.conv_in.weight")
    return any(name in tensors for name in known) and not any(
        name.startswith(others) for name in tensors
    )


def _load_first_stage_alone(
    path: epath.Path,
    tensors: StateDict,
    info: files.Info,
    yaml_path: epath.PathLike | None,
    ema: bool,
    dtype: Any,
    param_dtype: Any,
    mesh: Mesh | None,
    shapes_only: bool,
) -> bundle.LatentDiffusion:
    """`load` of a file that holds a first stage alone."""
    config, scale = _first_stage_config(path, yaml_path, tensors)
    module = autoencoder.from_config(config.first_stage)
    place = table.placer({"first_stage": _first_stage_shapes(module)}, mesh)
    params = _first_stage_params(
        path,
        tensors,
        info,
        config.first_stage,
        ema,
        param_dtype,
        None if shapes_only else lambda name, x: place(f"first_stage/{name}", x),
        shapes_only,
    )
    if scale == 1.0:
        LOG.info(f"{path.name}: a first stage alone, which says no latent scale: it is 1")
    return bundle.first_stage_alone(
        config.first_stage, params, scale, config.size, mesh, jnp.dtype(dtype)
    )


def _first_stage_config(
    path: epath.Path, yaml_path: epath.PathLike | None, tensors: StateDict
) -> tuple[schema.LatentDiffusionConfig, float]:
    """(config without a UNet, latent scale) of the first stage in a file."""
    tensors = _first_stage_tensors(path, tensors)
    if yaml_path is None:
        shapes = {n: tuple(x.shape) for n, x in tensors.items()}
        return schema.LatentDiffusionConfig(single_file.first_stage_config(shapes), unet=None), 1.0
    values = model_yaml.read(yaml_path)
    with reading.refusals(yaml_path, "give the YAML of this checkpoint (--config)"):
        config, scale = model_yaml.first_stage_alone_of(values)
        sizes.check(config.first_stage, "first_stage")
    return config, scale


def _first_stage_params(
    path: epath.Path,
    tensors: StateDict,
    info: files.Info,
    config: schema.FirstStageModelConfig,
    ema: bool,
    dtype: Any = np.float32,
    place: table.Place | None = None,
    shapes_only: bool = False,
) -> dict:
    module = autoencoder.from_config(config)
    entries, shapes = tables.autoencoder(module), _first_stage_shapes(module)
    taken = _taken(path, _first_stage_tensors(path, tensors), info, entries, ema)
    if shapes_only:
        taken = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), taken)
    return table.from_torch(entries, taken, shapes, dtype=dtype, place=place, where=str(path))


def _first_stage_tensors(path: epath.Path, tensors: StateDict) -> StateDict:
    """Tensors of the first stage, without a prefix. ValueError if there are none."""
    whole = any(name.startswith(FIRST_STAGE_PREFIX) for name in tensors)
    if whole:
        # the reference samples with the raw weights of a first stage within a model
        averaged = (FIRST_STAGE_PREFIX + EMA_PREFIX, EMA_PREFIX)
        tensors = {
            name.removeprefix(FIRST_STAGE_PREFIX): x
            for name, x in tensors.items()
            if name.startswith(FIRST_STAGE_PREFIX) and not name.startswith(averaged)
        }
    if "encoder.conv_in.weight" not in tensors:
        raise ValueError(f"{path}: holds no first stage (no tensor encoder.conv_in.weight)")
    return tensors


def yaml_text(model: bundle.LatentDiffusion) -> str:
    """The YAML that `save` writes. ValueError for a model that it cannot describe."""
    dumps = model_yaml.dumps_first_stage if model.config.unet is None else model_yaml.dumps
    return dumps(model.config, model.latent_scale)


def model_entries(model: bundle.LatentDiffusion) -> list[table.Entry]:
    """The table of a whole model: names as in the file, paths as in `LatentDiffusion.params`.

    A first stage alone has no prefix in the file.
    """
    if model.unet is None:
        return table.prefixed(tables.autoencoder(model.first_stage), "", "first_stage/")
    return [
        *table.prefixed(tables.unet(model.unet), UNET_PREFIX, "unet/"),
        *table.prefixed(tables.autoencoder(model.first_stage), FIRST_STAGE_PREFIX, "first_stage/"),
        *table.prefixed(
            text_tables.cond_stage(model.config.cond), COND_STAGE_PREFIX, "cond_stage/"
        ),
    ]


def model_shapes(model: bundle.LatentDiffusion) -> dict:
    """Shapes of `LatentDiffusion.params`."""
    return {
        "unet": {} if model.unet is None else _unet_shapes(model.unet),
        "first_stage": _first_stage_shapes(model.first_stage),
        "cond_stage": _cond_shapes(model.config.cond, model.cond_stage),
    }


def _config(
    path: epath.Path,
    yaml_path: epath.PathLike | None,
    variant: str | None,
    tensors: StateDict,
    marked: spellings.Markers,
) -> tuple[schema.LatentDiffusionConfig, float | None]:
    """(config, latent scale or None), with guesses printed."""
    if yaml_path is not None:
        if variant is not None:
            raise ValueError(f"{path}: variant={variant!r}, but {yaml_path} says what it is")
        shapes = {name: tuple(x.shape) for name, x in tensors.items()}
        values = model_yaml.read(yaml_path)
        with reading.refusals(yaml_path, "give the YAML of this checkpoint (--config)"):
            config, scale, guesses = model_yaml.config_of(values, shapes)
            sizes.check(serialize.from_dict(serialize.to_dict(config), "model"), "model")
            bundle.check(config, config.first_stage.in_channels)
        said = [f"{yaml_path}: read as {guess}" for guess in guesses]
        if marked.by_names:
            config = _marked(config, marked, said)
    else:
        try:
            named = spellings.with_unet_names(tensors)
            recognized = single_file.recognize(named, variant, marked.prediction)
            sizes.check(recognized.config, "model")
            bundle.check(recognized.config, recognized.config.first_stage.in_channels)
        except (ValueError, LookupError) as error:
            raise ValueError(
                f"{path}: has no YAML and is not recognised ({error}); give its YAML (--config)"
            ) from error
        config, scale = recognized.config, recognized.scale
        said = [f"{path.name}: {recognized.family}, by its names and shapes"]
        said += [f"{path.name}: a guess: {guess}" for guess in recognized.guesses]
        if marked.by_names and config.diffusion.prediction == "v":
            config = _marked(config, marked, said)
    for line in said:
        LOG.info(line)
    return config, scale


def _marked(
    config: schema.LatentDiffusionConfig, marked: spellings.Markers, said: list[str]
) -> schema.LatentDiffusionConfig:
    """The config with the objective that a file's markers name; `said` gets a line."""
    snr = marked.zero_terminal_snr or config.diffusion.zero_terminal_snr
    before = config.diffusion
    diffusion = dataclasses.replace(before, prediction="v", zero_terminal_snr=snr)
    more = ", to noise alone (--spacing trailing starts there)" if marked.zero_terminal_snr else ""
    instead = f" (instead of {before.prediction})" if before.prediction != "v" else ""
    said.append(f"it predicts v{instead}{more}: the file holds {' and '.join(marked.by_names)}")
    return dataclasses.replace(config, diffusion=diffusion)


def _take_scale(path: epath.Path, scale: float | None, tensors: dict[str, Any]) -> float:
    """The latent scale of the file if it has one (`scale_by_std`), else that of the config."""
    if "scale_factor" in tensors:
        scale = float(np.asarray(tensors.pop("scale_factor")).astype(np.float32))
        LOG.info(f"{path.name}: its own latent scale is {scale:g}")
    if scale is None:
        raise ValueError(f"{path}: its YAML says scale_by_std, but it has no scale_factor")
    return finite.checked(scale, f"{path}: scale_factor", nonzero=True)


# --- choice of tensors ---------------------------------------------------------------


def _taken(
    path: epath.Path, tensors: StateDict, info: files.Info, entries: list[table.Entry], ema: bool
) -> dict[str, Any]:
    """`take` of a file, with its remarks printed."""
    try:
        taken = take(tensors, entries, ema=ema)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for line in taken.said:
        LOG.info(f"{path.name}: {line}")
    if info.left:
        more = f" and {len(info.left) - 8} more" if len(info.left) > 8 else ""
        LOG.info(f"{path.name}: beside the state dict: {', '.join(info.left[:8])}{more}")
    return taken.tensors


class Taken(NamedTuple):
    """The tensors of a checkpoint for a table, and remarks about the others."""

    tensors: dict[str, Any]
    said: tuple[str, ...]


def ema_name(name: str) -> str:
    """Name of a parameter's moving average (`LitEma` deletes the dots)."""
    return EMA_PREFIX + name.removeprefix("model.").replace(".", "")


def take(tensors: StateDict, entries: list[table.Entry], *, ema: bool = True) -> Taken:
    """Names that entries can consume, averaged weights under their raw names, without `IGNORED`.

    Unknown names stay in: the table refuses them. ValueError if only some parameters
    of the UNet have an average.
    """
    names = {entry.torch for entry in entries}
    copies = {ema_name(name): name for name in names if ema_name(name) in tensors}
    use = ema and bool(copies)
    if copies and not use and not any(name in tensors for name in copies.values()):
        raise ValueError("it holds averaged weights alone, and the raw ones are asked for")
    if use:
        unet_names = sorted(n for n in names if n.startswith(UNET_PREFIX)) or sorted(names)
        lacking = [f"missing {ema_name(n)}" for n in unet_names if ema_name(n) not in copies]
        table.refuse(lacking, "its averaged weights are not whole (ema=False takes the raw ones)")
    twins = {ema_name(name) for name in tensors}  # of losses too, which have no entry
    chosen: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    for name, x in tensors.items():
        if use and name in copies:
            chosen[copies[name]] = x
        elif use and ema_name(name) in copies:
            counts["raw weights"] += 1
        elif name in twins:
            counts["averaged weights"] += 1
        elif name not in names and _twin(name) in tensors:
            counts["second copy of the first stage"] += 1
        elif (what := _ignored(name) or _second_text_encoder(name, names)) is not None:
            counts[what] += 1
        else:
            chosen[name] = x
    left = ", ".join(f"{what} ({n})" for what, n in counts.items())
    said = (_choice(bool(copies), use), *([f"not needed: {left}"] if left else []))
    return Taken(chosen, said)


def _twin(name: str) -> str | None:
    """Name in the first stage of a tensor that `__is_first_stage__` repeats under
    `cond_stage_model.`."""
    if not name.startswith(COND_STAGE_PREFIX):
        return None
    return FIRST_STAGE_PREFIX + name.removeprefix(COND_STAGE_PREFIX)


def _second_text_encoder(name: str, names: set[str]) -> str | None:
    """Description of a tensor of a second text encoder, which is not read; None for another."""
    if name in names:
        return None
    kinds = [re.compile(kind) for kind in TEXT_ENCODERS]
    read = [kind for kind in kinds if any(kind.match(entry) for entry in names)]
    return (
        "a second text encoder"
        if read and any(k.match(name) for k in kinds if k not in read)
        else None
    )


def _choice(has: bool, use: bool) -> str:
    if not has:
        return "takes the weights as they are: it holds no moving average beside them"
    return f"takes {'the averaged' if use else 'the raw'} weights; it holds both"


def _ignored(name: str) -> str | None:
    """The entry of `IGNORED` that a name belongs to, or None."""
    return next((what for what, pattern in IGNORED if re.fullmatch(pattern, name)), None)
