"""Models of CompVis/latent-diffusion and Stable Diffusion: checkpoints into models, and back."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ldm_jax import bundle, diffusion, finite, schema
from ldm_jax.convert import table, text_tables
from ldm_jax.convert.compvis import model_yaml, parts, single_file, spellings, tables
from ldm_jax.convert.compvis.first_stage_files import is_first_stage_alone, load_first_stage_alone
from ldm_jax.convert.compvis.selection import (
    COND_STAGE_PREFIX,
    FIRST_STAGE_PREFIX,
    UNET_PREFIX,
    StateDict,
    take_from_file,
)
from ldm_jax.convert.formats import files, safetensors_file, torch_writer
from ldm_jax.runtime import reading
from ldm_jax.runtime.log import LOG
from ldm_jax.schema import serialize, sizes

TRANSFORMERS_TEXT = COND_STAGE_PREFIX + "transformer.text_model."


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
        A file of `save` says what it is.
    ema: take the averaged weights where there are both.
    dtype, param_dtype: of computation and of the parameters.
    mesh: places the parameters by the training rules; None: on the default device.
    shapes_only: the parameters are ShapeDtypeStructs, and no weight is read.
    Raises ValueError that names the file for tensors that are unknown, missing or of another shape.
    Tensors left unread (see `selection.IGNORED`) are counted and printed.
    """
    path = epath.Path(path)
    state_dict, info = files.open_state_dict(path)
    tensors, said = spellings.common(state_dict)
    tensors, marked = spellings.markers(tensors, info.metadata)
    for line in said:
        LOG.info(f"{path.name}: {line}")
    if is_first_stage_alone(tensors):
        return load_first_stage_alone(
            path, tensors, info, yaml_path, ema, dtype, param_dtype, mesh, shapes_only
        )
    known = model_yaml.of_metadata(info.metadata, path) if variant is None else None
    config, scale = _config(path, yaml_path, variant, tensors, marked, known)
    model = bundle.build(
        config,
        {},
        _take_scale(path, scale, tensors),
        dtype=jnp.dtype(dtype),
        **bundle.kernels(mesh),
    )
    entries, shapes = model_entries(model), model_shapes(model)
    taken = take_from_file(path, tensors, info, entries, ema)
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
    for name in _markers(model, tensors):
        tensors[name] = np.zeros(0, np.float32)
    about = model_yaml.metadata(model.config, model.latent_scale)
    if path.suffix == ".ckpt":
        torch_writer.write_object(path, {"state_dict": tensors, **about})
    else:
        safetensors_file.write(path, tensors, {"format": "pt", **about, **_metadata(model)})
    path.with_suffix(".yaml").write_text(text)


def _markers(model: bundle.LatentDiffusion, names: Iterable[str]) -> list[str]:
    """Names of the empty tensors by which other programs know what a UNet predicts.

    Version 2 that predicts v has none: they find that out, and some take a marked file for
    version 1.
    """
    if model.unet is None or model.prediction != "v":
        return []
    snr = model.config.diffusion.zero_terminal_snr
    first = any(name.startswith(TRANSFORMERS_TEXT) for name in names)
    return ["v_pred"] * (first or snr) + ["ztsnr"] * snr


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
        "unet": {} if model.unet is None else parts.unet_shapes(model.unet),
        "first_stage": parts.first_stage_shapes(model.first_stage),
        "cond_stage": parts.cond_shapes(model.config.cond, model.cond_stage),
    }


def _config(
    path: epath.Path,
    yaml_path: epath.PathLike | None,
    variant: str | None,
    tensors: StateDict,
    marked: spellings.Markers,
    known: tuple[schema.LatentDiffusionConfig, float] | None,
) -> tuple[schema.LatentDiffusionConfig, float | None]:
    """(config, latent scale or None), with guesses printed; known: what the file itself says."""
    if yaml_path is not None:
        if variant is not None:
            raise ValueError(f"{path}: variant={variant!r}, but {yaml_path} says what it is")
        shapes = {name: tuple(x.shape) for name, x in tensors.items()}
        values = model_yaml.read(yaml_path)
        with reading.refusals(yaml_path, "give the YAML of this checkpoint (--config)"):
            config, scale, guesses = model_yaml.config_of(values, shapes)
            sizes.check(serialize.from_dict(serialize.to_dict(config), "model"), "model")
            bundle.check(config, config.first_stage.in_channels)
            diffusion.from_config(config.diffusion)
        said = [f"{yaml_path}: read as {guess}" for guess in guesses]
        if marked.by_names:
            config = _marked(config, marked, said)
    elif known is not None:
        config, scale = known
        with reading.refusals(path, "give its YAML (--config)"):
            bundle.check(config, config.first_stage.in_channels)
        said = [f"{path.name}: the model that the file says, as ldm_jax wrote it"]
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
