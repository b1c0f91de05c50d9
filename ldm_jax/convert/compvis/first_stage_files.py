"""A first stage in a file: alone, or within the checkpoint of a model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ldm_jax import bundle, schema
from ldm_jax.convert import table
from ldm_jax.convert.compvis import model_yaml, parts, single_file, spellings, tables
from ldm_jax.convert.compvis.selection import (
    COND_STAGE_PREFIX,
    EMA_PREFIX,
    FIRST_STAGE_PREFIX,
    UNET_PREFIX,
    StateDict,
    ema_name,
    take_from_file,
)
from ldm_jax.convert.formats import files
from ldm_jax.models import autoencoder
from ldm_jax.runtime import reading
from ldm_jax.runtime.log import LOG
from ldm_jax.schema import sizes


def load_first_stage_file(
    path: epath.PathLike, yaml_path: epath.PathLike | None = None, *, ema: bool = True
) -> tuple[dict, schema.FirstStageModelConfig]:
    """(host parameters, config) of a first stage: its own checkpoint, or that within a model's.

    yaml_path: the YAML of the first stage or of the model; None: from names and shapes.
    """
    path = epath.Path(path)
    state_dict, info = files.open_state_dict(path)
    tensors, _ = spellings.common(state_dict)
    config, _ = _first_stage_config(path, yaml_path, tensors, info)
    first_stage = config.first_stage
    return _first_stage_params(path, tensors, info, first_stage, ema), first_stage


def is_first_stage_alone(tensors: StateDict) -> bool:
    """Tell whether a state dict has a first stage, but neither a UNet nor a conditioning stage."""
    others = (UNET_PREFIX, COND_STAGE_PREFIX, ema_name(UNET_PREFIX))
    known = ("encoder.conv_in.weight", FIRST_STAGE_PREFIX + "encoder.conv_in.weight")
    return any(name in tensors for name in known) and not any(
        name.startswith(others) for name in tensors
    )


def load_first_stage_alone(
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
    """The model (see `checkpoints.load`) of a file that holds a first stage alone."""
    config, scale = _first_stage_config(path, yaml_path, tensors, info)
    module = autoencoder.from_config(config.first_stage)
    place = table.placer({"first_stage": parts.first_stage_shapes(module)}, mesh)
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
    path: epath.Path, yaml_path: epath.PathLike | None, tensors: StateDict, info: files.Info
) -> tuple[schema.LatentDiffusionConfig, float]:
    """(config without a UNet, latent scale) of the first stage in a file."""
    tensors = _first_stage_tensors(path, tensors)
    if yaml_path is None and (known := model_yaml.of_metadata(info.metadata, path)) is not None:
        return known
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
    entries, shapes = tables.autoencoder(module), parts.first_stage_shapes(module)
    taken = take_from_file(path, _first_stage_tensors(path, tensors), info, entries, ema)
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
