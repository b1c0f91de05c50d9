"""Save a model as a run, a diffusers folder or a CompVis checkpoint; `loading` reads all three."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ldm_jax import bundle, finite, schema, sharding
from ldm_jax.convert import compvis, table
from ldm_jax.convert.diffusers import writer as diffusers_writer
from ldm_jax.runtime import checkpoint, rundir
from ldm_jax.schema import serialize

Format = Literal["ldm_jax", "diffusers", "compvis"]


def save(
    model: bundle.LatentDiffusion,
    path: epath.PathLike,
    params: bundle.Params | None = None,
    *,
    to: Format = "ldm_jax",
    dtype: Any = None,
) -> None:
    """Write the model in one of three formats to a path that does not exist yet.

    params: parameters in place of `model.params`, as after training or merging.
    to: "ldm_jax", a run directory that samples and that training can start from; "diffusers", a
    folder with every component, tokenizer and scheduler, or the folder of a first stage alone;
    "compvis", a .safetensors or .ckpt file,
    as `path` ends, with its YAML beside it.
    dtype: that of the weights; default: the parameters' own. ValueError for parameters that are not
    the model's, or not finite, and for a model that the format cannot hold.
    """
    path = checkpoint.absolute(path)
    if params is not None:
        check_params(model, params)
        model = dataclasses.replace(model, params=params)
    if to == "ldm_jax":
        save_run(model, path, dtype=dtype)
    elif to == "diffusers":
        diffusers_writer.save(model, path, dtype=dtype)
    elif to == "compvis":
        compvis.save(model, path, dtype=dtype)
    else:
        raise ValueError(f"format {to!r} is not one of ldm_jax, diffusers, compvis")


def check_params(model: bundle.LatentDiffusion, params: bundle.Params) -> None:
    """ValueError unless `params` have the names and shapes of the model's, and are finite."""
    wanted, given = (
        {sharding.path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (model.params, params)
    )
    for name in sorted(wanted.keys() | given.keys()):
        shapes = [np.shape(tree[name]) if name in tree else "nothing" for tree in (wanted, given)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"params are not those of the model: {name} is {shapes[1]}, there {shapes[0]}"
            )
        if not bool(jnp.all(jnp.isfinite(given[name]))):
            raise ValueError(f"params: {name} holds values that are not finite; nothing is saved")


def check(model: bundle.LatentDiffusion, to: Format) -> int:
    """Number of tensors that `save` would write; ValueError for a model that the format cannot
    hold.

    The parameters may be ShapeDtypeStructs.
    """
    if to == "ldm_jax":
        return len(jax.tree.leaves(model.params))
    if to == "diffusers":
        return diffusers_writer.check(model)
    model = compvis.as_written(model)
    compvis.yaml_text(model)
    return len(table.to_torch(compvis.model_entries(model), model.params, lazy=True))


def save_run(model: bundle.LatentDiffusion, run: epath.PathLike, *, dtype: Any = None) -> None:
    """Write a run directory with a snapshot of step 0: config, first stage, text encoder,
    tokenizer."""
    model_config, unet = model.config, model.config.unet
    if unet is None:
        _save_first_stage_run(model, run, dtype)
        return
    text = schema.text_of(model_config.cond)
    # the run keeps encoder and tokenizer: where they once lay is of no use elsewhere
    cond = schema.with_text(model_config.cond, path="", tokenizer="")
    model_config = dataclasses.replace(model_config, cond=cond)
    config = schema.LatentDiffusionTrainConfig(
        data=schema.DataConfig(
            size=model_config.size, channels=1 if model_config.first_stage.in_channels == 1 else 3
        ),
        first_stage=schema.FirstStageConfig(scale=model.latent_scale),
        unet=unet,
        cond=model_config.cond,
        diffusion=model_config.diffusion,
        sampling=model_config.sampling,
    )
    params = {part: _host(tree, dtype) for part, tree in model.params.items()}
    run, _ = rundir.open_run(run, config)
    rundir.write_frozen(run, "first_stage", params["first_stage"], model_config.first_stage)
    rundir.write_latents(run, {"scale": model.latent_scale, "how": "as in the converted model"})
    if model.classes is not None:
        rundir.write_data(run, {"classes": model.classes, "records": {}})
    trained = {"unet": params["unet"]}
    if text is not None and not text.trainable:
        rundir.write_frozen(run, "cond_stage", params["cond_stage"], text.encoder)
    elif params["cond_stage"]:
        trained["cond_stage"] = params["cond_stage"]
    if model.tokenizer is not None:
        rundir.write_frozen_files(run, "tokenizer", model.tokenizer.save)
    checkpoint.save_snapshot(run, 0, trained, serialize.to_dict(model_config))


def _save_first_stage_run(
    model: bundle.LatentDiffusion, run: epath.PathLike, dtype: Any = None
) -> None:
    """The run of a first stage, with its latent scale in latents.json."""
    first_stage = model.config.first_stage
    if isinstance(first_stage, schema.IdentityFirstStageConfig):
        raise ValueError("the identity is no first stage to save: it has no weights")
    config = schema.AutoencoderTrainConfig(
        data=schema.DataConfig(
            size=model.config.size, channels=1 if first_stage.in_channels == 1 else 3
        ),
        model=first_stage,
    )
    run, _ = rundir.open_run(run, config)
    rundir.write_latents(run, {"scale": model.latent_scale, "how": "as in the converted model"})
    params = {"autoencoder": _host(model.params["first_stage"], dtype)}
    checkpoint.save_snapshot(run, 0, params, serialize.to_dict(first_stage))


def _host(tree: dict, dtype: Any) -> dict:
    def one(x: Any) -> np.ndarray:
        x = np.asarray(jax.device_get(x))
        return x if dtype is None else x.astype(dtype, copy=False)

    host = jax.tree.map(one, tree)
    if dtype is not None:
        finite.check_tree(host, "the model")
    return host
