"""Load a model from a path, whose kind is recognised by its files."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import errors
from jax.sharding import Mesh

from ldm_jax import bundle, diffusion, finite, schema, shapes, sharding
from ldm_jax.adapters import lora, runs, textual_inversion
from ldm_jax.convert import compvis, diffusers
from ldm_jax.data import tokens
from ldm_jax.runtime import checkpoint, reading, rundir

CHECKPOINTS = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")


def load(
    path: epath.PathLike,
    *,
    step: int | None = None,
    ema: bool = True,
    mesh: Mesh | None = None,
    dtype: Any = None,
    param_dtype: Any = None,
    config: epath.PathLike | None = None,
    variant: str | None = None,
    tokenizer: epath.PathLike | None = None,
    shapes_only: bool = False,
) -> bundle.LatentDiffusion:
    """The model at a path: a run, a diffusers folder, or a checkpoint of CompVis or Stability.

    A first stage alone (its run, a folder as `sd-vae-ft-mse`, a checkpoint as `vae-ft-mse.ckpt`)
    gives a model that encodes and decodes, whose `unet` is None. Its latent scale is what the
    folder or our own conversion says, else 1.

    A run gives its newest snapshot or checkpoint, or that of `step`. A checkpoint file is read with
    the YAML `config`, by default NAME.yaml or config.yaml beside it; without any, it must be Stable
    Diffusion, which is recognised by its tensors. `ema=False` takes the raw weights where there are
    both. `mesh` places the parameters by the training rules; without it they lie on the default
    device. `dtype` is the compute type and `param_dtype` that of the parameters, both float32 by
    default. `variant` chooses among the weights of a diffusers folder ("fp16"), or says which
    Stable Diffusion a single file is, where it could be several ("v2-v"). `tokenizer` is a folder
    with a tokenizer's files, for a model of text that comes without. With `shapes_only` the
    parameters are ShapeDtypeStructs: the same checks are made, but no weights of a folder or file
    are read. ValueError or FileNotFoundError name the path, the fault, and the files that were
    looked for.
    """
    path, kind = recognise(path)
    dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    param_dtype = jnp.dtype(jnp.float32 if param_dtype is None else param_dtype)
    _check_options(path, kind, step, config, variant)
    if kind == "run":
        model = _load_run(path, step, ema, mesh, dtype, param_dtype)
    elif kind == "diffusers":
        model = diffusers.load(
            path,
            variant=variant,
            dtype=dtype,
            param_dtype=param_dtype,
            mesh=mesh,
            shapes_only=shapes_only,
        )
    elif kind == "first_stage":
        model = _load_first_stage_folder(path, variant, mesh, dtype, param_dtype)
    else:
        model = compvis.load(
            path,
            yaml_of(path) if config is None else checkpoint.absolute(config),
            variant=variant,
            ema=ema,
            dtype=dtype,
            param_dtype=param_dtype,
            mesh=mesh,
            shapes_only=shapes_only,
        )
    if shapes_only:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params)
        model = dataclasses.replace(model, params=shapes)
    return model if tokenizer is None else _with_tokenizer(model, path, tokenizer)


def _check_options(path: epath.Path, kind: str, step: Any, config: Any, variant: Any) -> None:
    if step is not None and kind != "run":
        raise ValueError(f"{path}: step={step} is of a run, and this is {KINDS[kind]}")
    if config is not None and kind != "checkpoint":
        raise ValueError(f"{path}: config={config} is of a checkpoint, and this is {KINDS[kind]}")
    if variant is not None and kind == "run":
        raise ValueError(f"{path}: variant={variant}, but a run has one set of weights")


# --- the kind of a path
# ----------------------------------------------------------------------------

KINDS = {
    "run": "a run",
    "diffusers": "a diffusers folder",
    "first_stage": "the folder of a first stage",
    "checkpoint": "a checkpoint file",
}


def recognise(path: epath.PathLike) -> tuple[epath.Path, str]:
    """(absolute path, one of KINDS); a folder with one checkpoint is that checkpoint.

    FileNotFoundError or ValueError name the files that were looked for.
    """
    path = checkpoint.absolute(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: does not exist")
    if not path.is_dir():
        if path.suffix in (".yaml", ".yml", ".json"):
            raise ValueError(f"{path}: is a configuration; give the checkpoint or the folder")
        return path, "checkpoint"
    if rundir.is_run(path):
        return path, "run"
    if (path / "model_index.json").exists():
        return path, "diffusers"
    if diffusers.is_first_stage(path):
        return path, "first_stage"
    checkpoints = sorted(f for f in path.iterdir() if f.suffix in CHECKPOINTS)
    if (path / "config.json").exists():
        raise ValueError(
            f"{path}: is not a run directory (its config.json is not ours), but perhaps one"
            " component of a diffusers folder: give the folder with model_index.json"
        )
    if len(checkpoints) == 1:
        return checkpoints[0], "checkpoint"
    held = ", ".join(f.name for f in checkpoints) or "none"
    raise ValueError(
        f"{path}: is not a run directory (no config.json), nor a diffusers folder (no"
        f" model_index.json), nor does it hold one checkpoint ({', '.join(CHECKPOINTS)}: {held})"
    )


def yaml_of(path: epath.Path) -> epath.Path | None:
    """The YAML beside a checkpoint: NAME.yaml, or config.yaml as in the folders of CompVis."""
    names = [path.stem + end for end in (".yaml", ".yml")] + ["config.yaml"]
    return next((path.parent / name for name in names if (path.parent / name).exists()), None)


def _with_tokenizer(
    model: bundle.LatentDiffusion, path: epath.Path, tokenizer: epath.PathLike
) -> bundle.LatentDiffusion:
    text = schema.text_of(model.config.cond)
    if text is None:
        raise ValueError(f"{path}: is not conditioned on text and takes no tokenizer ({tokenizer})")
    # OpenCLIP's models, whose activation is not CLIP's, were trained with texts padded with 0
    openclip = getattr(text.encoder, "activation", None) == "gelu"
    pad_id = 0 if openclip and str(tokenizer) != "bytes" else None
    opened = tokens.load_tokenizer(tokenizer, text.encoder.max_length, pad_id=pad_id)
    if opened.vocab_size > text.encoder.vocab_size:
        raise ValueError(
            f"{tokenizer}: has {opened.vocab_size} tokens, but the text encoder of {path} knows"
            f" {text.encoder.vocab_size}: it is another model's tokenizer"
        )
    return dataclasses.replace(model, tokenizer=opened)


# --- runs ---------------------------------------------------------------------------------------


def _load_run(
    run: epath.Path, step: int | None, ema: bool, mesh: Mesh | None, dtype: Any, param_dtype: Any
) -> bundle.LatentDiffusion:
    config = rundir.read_config(run)
    if isinstance(config, schema.AutoencoderTrainConfig):
        return _load_first_stage_run(run, config, step, ema, mesh, dtype, param_dtype)
    trained, _ = weights(run, config, step, ema)
    trained = {**(kept_base(run, config) or {}), **trained}
    kept, known = kept_first_stage(run), rundir.read_latents(run)
    if kept is None or known is None:
        raise FileNotFoundError(f"{run}: frozen/ or latents.json is missing: copy the whole run")
    first_stage, first_stage_config = kept
    model_config = bundle.model_config(config, first_stage_config)
    with reading.refusals(run / "config.json", checkpoint.LOAD_SO):
        bundle.check(model_config, config.data.channels)
        diffusion.from_config(config.diffusion)
    text = schema.text_of(config.cond)
    params = {
        "unet": trained["unet"],
        "first_stage": first_stage,
        "cond_stage": _cond_stage(run, text, trained),
    }
    if "lora" in trained:
        settings: schema.LoRAConfig = getattr(config, "lora")  # noqa: B009
        update = lora.from_tree(trained["lora"], settings.alpha)
        params = jax.device_get(lora.merged(params, [(update, 1.0)]))
    params = jax.tree.map(lambda x: np.asarray(x).astype(param_dtype, copy=False), params)
    finite.check_tree(params, str(run))
    model = bundle.build(
        model_config,
        _placed(params, mesh),
        known["scale"],
        dtype=dtype,
        **bundle.kernels(mesh),
    )
    if text is None:
        return dataclasses.replace(model, classes=_classes(run, config.cond))
    model = dataclasses.replace(model, tokenizer=kept_tokenizer(run, text.encoder.max_length))
    if isinstance(config, schema.TextualInversionTrainConfig):
        vectors = jnp.asarray(trained["embedding"]["vectors"], param_dtype)
        model = textual_inversion.added(model, [textual_inversion.Embedding(config.token, vectors)])
    return model


def kept_base(run: epath.PathLike, config: schema.TrainConfig) -> dict | None:
    """Host {"unet"}, or {"unet", "cond_stage"} of a model without text, that an adapter was trained
    beside; None in another run.

    ValueError if the model that the run names, where it keeps none, is another one by now.
    """
    if not runs.trains_adapter(config):
        return None
    wanted = runs.base_shapes(config)
    kept = rundir.read_frozen(run, "unet", lambda _: wanted["unet"])
    elsewhere = rundir.read_base(run)
    if kept is not None:
        base = {"unet": kept[0]}
    elif elsewhere is not None:
        model = load(elsewhere["path"], param_dtype=elsewhere["dtype"])
        base = {"unet": jax.device_get(model.params["unet"])}
        if rundir.params_hash(base["unet"]) != elsewhere["hash"]:
            raise ValueError(
                f"{elsewhere['path']}: is not the model that {run} was trained beside; bring that"
                " back to this path"
            )
    else:
        return None
    if schema.text_of(config.cond) is None and wanted["cond_stage"]:
        cond_stage = rundir.read_frozen(run, "cond_stage", lambda _: wanted["cond_stage"])
        if cond_stage is None:
            raise FileNotFoundError(f"{run}: frozen/cond_stage is missing: copy the whole run")
        base["cond_stage"] = cond_stage[0]
    return base


def _classes(run: epath.Path, cond: schema.CondConfig) -> tuple[str, ...] | None:
    """Names of the classes that a run was trained on; None for another model, or an older run."""
    known = rundir.read_data(run) if isinstance(cond, schema.ClassCondConfig) else None
    return None if known is None or known["classes"] is None else tuple(known["classes"])


def _load_first_stage_run(
    run: epath.Path,
    config: schema.AutoencoderTrainConfig,
    step: int | None,
    ema: bool,
    mesh: Mesh | None,
    dtype: Any,
    param_dtype: Any,
) -> bundle.LatentDiffusion:
    trained, _ = weights(run, config, step, ema)
    known = rundir.read_latents(run)
    scale = 1.0 if known is None else known["scale"]
    params = jax.tree.map(lambda x: np.asarray(x).astype(param_dtype), trained["autoencoder"])
    return bundle.first_stage_alone(
        config.model, _placed_first_stage(params, mesh), scale, config.data.size, mesh, dtype
    )


def _load_first_stage_folder(
    folder: epath.Path, variant: str | None, mesh: Mesh | None, dtype: Any, param_dtype: Any
) -> bundle.LatentDiffusion:
    params, config = diffusers.load_first_stage(folder, variant=variant, param_dtype=param_dtype)
    scale, size = diffusers.first_stage_scale(folder), diffusers.first_stage_size(folder)
    return bundle.first_stage_alone(
        config, _placed_first_stage(params, mesh), scale, size, mesh, dtype
    )


def _placed_first_stage(params: dict, mesh: Mesh | None) -> dict:
    return _placed({"first_stage": params}, mesh)["first_stage"]


def _placed(params: dict, mesh: Mesh | None) -> dict:
    """Host arrays on the default device, or laid out on the mesh by the training rules."""
    if mesh is None:
        return jax.device_put(params)  # jnp.asarray would compile a program for each shape
    return sharding.place(params, sharding.by_rules(params, sharding.RULES, mesh))


def _cond_stage(run: epath.Path, text: schema.TextCondConfig | None, trained: dict) -> dict:
    """Parameters of the trained conditioning stage, or of the frozen text encoder."""
    if text is None or text.trainable:
        return trained.get("cond_stage", {})
    kept = kept_text_encoder(run, text)
    if kept is None:
        raise FileNotFoundError(f"{run}: frozen/cond_stage is missing: copy the whole run")
    return kept


def kept_first_stage(run: epath.PathLike) -> tuple[dict, schema.FirstStageModelConfig] | None:
    """(host parameters, config) of the frozen first stage of a run, or None if it has none.

    ValueError if the parameters are damaged, or not those of the config.
    """
    return rundir.read_frozen(run, "first_stage", shapes.first_stage)


def kept_text_encoder(run: epath.PathLike, cond: schema.CondConfig) -> dict | None:
    """Host parameters of the frozen text encoder of a run on `cond`, or None if it has none."""
    kept = rundir.read_frozen(run, "cond_stage", lambda encoder: shapes.cond(cond))
    return None if kept is None else kept[0]


def kept_tokenizer(run: epath.PathLike, max_length: int) -> Any:
    """The tokenizer that a run keeps, or None."""
    with rundir.frozen_files(run, "tokenizer") as folder:
        return None if folder is None else tokens.load_tokenizer(folder, max_length)


def weights(
    run: epath.Path, config: schema.TrainConfig, step: int | None, ema: bool
) -> tuple[dict, int]:
    """(host parameters of the parts that trained, their step): snapshot or checkpoint, the newest.

    With `ema` the averaged weights of the parts that have an average.
    """
    return checkpoint.trained(run, trained_shapes(run, config), step, ema)


def trained_shapes(run: epath.Path, config: schema.TrainConfig) -> dict:
    """{part: shapes} of all that trains in a run. ValueError if there is no such model."""
    with reading.refusals(run / "config.json", checkpoint.LOAD_SO):
        try:
            if isinstance(config, schema.AutoencoderTrainConfig):
                logvar = jax.ShapeDtypeStruct((), jnp.float32)
                return {"autoencoder": shapes.first_stage(config.model), "logvar": logvar}
            if runs.trains_adapter(config):
                return runs.trained_shapes(config)
            logvar = jax.ShapeDtypeStruct((config.diffusion.timesteps,), jnp.float32)
            wanted = {"unet": shapes.unet(config.unet), "logvar": logvar}
            text = schema.text_of(config.cond)
            if (text is None or text.trainable) and (learned := shapes.cond(config.cond)):
                wanted["cond_stage"] = learned
            return wanted
        except errors.FlaxError as error:
            raise ValueError(str(error)) from error


# --- parts of a model, to train on ---------------------------------------------------------------


def load_first_stage(
    path: epath.PathLike, *, step: int | None = None
) -> tuple[dict, schema.FirstStageModelConfig]:
    """(host parameters, config) of a first stage: of its own run, or of a model at `path`."""
    path, kind = recognise(path)
    if kind == "run":
        config = rundir.read_config(path)
        if not isinstance(config, schema.AutoencoderTrainConfig):
            kept = rundir.read_frozen(path, "first_stage")
            if kept is None:
                raise FileNotFoundError(
                    f"{path}: frozen/first_stage is missing: copy the whole run"
                )
            return kept
        params, _ = weights(path, config, step, ema=True)
        return params["autoencoder"], config.model
    if kind in ("diffusers", "first_stage"):
        return diffusers.load_first_stage(path, variant=diffusers.sole_variant(path, "first_stage"))
    return compvis.load_first_stage_file(path, yaml_of(path))


def load_text_encoder(
    path: epath.PathLike, max_length: int
) -> tuple[dict, schema.CLIPTextConfig | schema.BERTTextConfig, Any]:
    """(host parameters, config, tokenizer or None) of the text encoder of a model at `path`.

    The tokenizer gives `max_length` tokens for each text. ValueError if the model has no text
    encoder.
    """
    path, kind = recognise(path)
    if kind == "diffusers":
        variant = diffusers.sole_variant(path, "cond_stage")
        params, encoder = diffusers.load_text_encoder(path, variant=variant)
        folder = path / "tokenizer"
        known = tokens.load_tokenizer(folder, max_length) if folder.exists() else None
        return params, encoder, known
    model = load(path)
    text = schema.text_of(model.config.cond)
    if text is None:
        raise ValueError(f"{path}: has no text encoder")
    known = kept_tokenizer(path, max_length) if kind == "run" else None
    return jax.device_get(model.params["cond_stage"]), text.encoder, known
