"""The start of a diffusion model from trained weights: `--init-from PATH`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ldm_jax import bundle, conditioning, loading, schema, sharding
from ldm_jax.runtime import checkpoint, rundir
from ldm_jax.runtime.log import LOG
from ldm_jax.train_state import TrainState

OF_MODEL = (
    "schedule",
    "timesteps",
    "beta_start",
    "beta_end",
    "zero_terminal_snr",
    "prediction",
)
"""Fields of the diffusion that the weights were trained for; the others are of the objective."""


def adopt(
    config: schema.LatentDiffusionTrainConfig, init_from: str, workdir: epath.PathLike | None
) -> schema.LatentDiffusionTrainConfig:
    """The config with the model of `init_from`, or of the run at `workdir` that began from one.

    Only reads. ValueError for a path without a diffusion model, and for another path than that
    which the run began from.
    """
    begun = _begun(workdir)
    if begun is not None:
        if init_from not in ("", begun.init_from):
            raise ValueError(
                f"--init-from {init_from}: {workdir} began from {begun.init_from}; leave the option"
                " out, or use another --workdir"
            )
        return dataclasses.replace(
            config,
            init_from=begun.init_from,
            data=_data(config, begun.data.channels, begun.data.size),
            first_stage=dataclasses.replace(config.first_stage, scale=begun.first_stage.scale),
            unet=begun.unet,
            cond=begun.cond,
            diffusion=_objective(config.diffusion, begun.diffusion),
            sampling=begun.sampling,
        )
    if not init_from:
        return config
    model = loading.load(init_from, shapes_only=True)
    if model.unet is None:
        raise ValueError(
            f"--init-from {init_from}: is a first stage alone; a diffusion model starts from a"
            " whole one (--first-stage.path takes first stages)"
        )
    return dataclasses.replace(with_model(config, model), init_from=init_from)


def _begun(workdir: epath.PathLike | None) -> schema.LatentDiffusionTrainConfig | None:
    """The config of a run that was started with `--init-from`."""
    if not workdir or not rundir.is_run(workdir):
        return None
    config = rundir.read_config(workdir)
    is_ldm = isinstance(config, schema.LatentDiffusionTrainConfig)
    return config if is_ldm and config.init_from else None


def with_model(
    config: schema.LatentDiffusionTrainConfig, model: bundle.LatentDiffusion
) -> schema.LatentDiffusionTrainConfig:
    """The config with the model's own UNet, condition, schedule and scale.

    A concat condition that the config has and the model lacks stays, and widens the UNet's input.
    """
    first_stage = model.config.first_stage
    cond = _condition(config.cond, model.config.cond)
    extra = conditioning.concat_channels(cond, first_stage.embed_dim, first_stage.in_channels)
    channels: Any = first_stage.in_channels
    return dataclasses.replace(
        config,
        data=_data(config, channels, model.config.size),
        first_stage=dataclasses.replace(config.first_stage, scale=float(model.latent_scale)),
        unet=dataclasses.replace(model.config.unet, in_channels=first_stage.embed_dim + extra),
        cond=cond,
        diffusion=_objective(config.diffusion, model.config.diffusion),
        sampling=model.config.sampling,
    )


def _data(config: schema.LatentDiffusionTrainConfig, channels: Any, size: int) -> schema.DataConfig:
    """The run's data, with pictures as large as the model's where it is finetuned."""
    size = size if isinstance(config, schema.FinetuneTrainConfig) else config.data.size
    return dataclasses.replace(config.data, channels=channels, size=size)


def _condition(own: schema.CondConfig, model: schema.CondConfig) -> schema.CondConfig:
    """The model's condition, with the config's share of dropped ones where it is of its kind."""
    if schema.text_of(model) is not None:
        # files are found at init_from; a path of the model's own run may be gone
        mine = schema.text_of(own)
        kept = {} if mine is None else {"dropout": mine.dropout}
        model = schema.with_text(model, path="", tokenizer="", **kept)
    elif model is not None and type(own) is type(model):
        model = dataclasses.replace(model, dropout=own.dropout)
    beside = own.concat if isinstance(own, schema.HybridCondConfig) else own
    if _is_concat(beside) and not _is_concat(model):
        if model is None:
            return beside
        if isinstance(model, schema.TextCondConfig):
            return schema.HybridCondConfig(text=model, concat=beside)
    return model


def _is_concat(cond: schema.CondConfig) -> bool:
    return conditioning.concat_channels(cond, 1, 1) > 0


def _objective(
    own: schema.DiffusionConfig, model: schema.DiffusionConfig
) -> schema.DiffusionConfig:
    """The objective of `own` on the schedule and prediction of `model`."""
    return dataclasses.replace(own, **{name: getattr(model, name) for name in OF_MODEL})


def begin(
    config: schema.LatentDiffusionTrainConfig,
    run: epath.Path,
    state: TrainState,
    shardings: TrainState,
    mesh: Mesh,
) -> TrainState:
    """The fresh state with the weights of `init_from`, or of the conversion that made the run.

    Weights go straight to their shards; the average starts from them too. ValueError if they do
    not fit the config, or come from both places.
    """
    converted = 0 in checkpoint.snapshot_steps(run)
    if converted and config.init_from:
        raise ValueError(
            f"--init-from {config.init_from}: {run} has weights of its own (snapshots/0); leave"
            " the option out, or use another --workdir"
        )
    if converted:
        source, given = f"{run}/snapshots/0", checkpoint.load_snapshot(run, 0, state.params)[0]
        given = sharding.place(given, sharding.by_rules(given, sharding.RULES, mesh))
    elif config.init_from:
        model = loading.load(config.init_from, mesh=mesh)
        source, given = config.init_from, model.params
        LOG.info(f"the model of {source}: {bundle.summary(model)[-1]}")
    else:
        return state
    params = {}
    for part, fresh in state.params.items():
        weights = given.get(part) or fresh  # no model has a logvar, and some learn no condition
        if part == "unet":
            weights = _widened(weights, fresh)
        check(source, {part: weights}, {part: fresh})
        params[part] = jax.tree.map(lambda x, like: x.astype(like.dtype), weights, fresh)
    LOG.info(f"starts from the weights in {source}")
    # copies: the step donates its state, and one buffer cannot be given away twice
    average = jax.jit(lambda x: jax.tree.map(jnp.copy, x), out_shardings=shardings.ema_params)
    return state.replace(
        params=params, ema_params=average({part: params[part] for part in state.ema_params})
    )


def _widened(unet: dict, fresh: dict) -> dict:
    """The UNet with zeros for input channels that it lacks: they change nothing at first.

    As `LatentFinetuneDiffusion.init_from_ckpt`, which keeps the given channels in front.
    """
    kernel, wanted = unet["conv_in"]["kernel"], fresh["conv_in"]["kernel"]
    more = wanted.shape[2] - kernel.shape[2]
    if more <= 0 or kernel.shape[3] != wanted.shape[3]:
        return unet
    pad = jax.jit(
        lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))), out_shardings=wanted.sharding
    )
    LOG.info(f"{more} input channels are added to {kernel.shape[2]}, with weights of zero")
    return {**unet, "conv_in": {**unet["conv_in"], "kernel": pad(kernel)}}


def check(source: str, weights: dict, wanted: dict) -> None:
    """ValueError, naming the source, for weights of other names or shapes than those wanted."""
    given, known = (
        {sharding.path_name(p): np.shape(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (weights, wanted)
    )
    odd = [n for n in sorted(given.keys() | known.keys()) if given.get(n) != known.get(n)]
    if odd:
        raise ValueError(
            f"{source}: is not the model of the config: {len(odd)} arrays differ, as {odd[0]}:"
            f" {given.get(odd[0], 'not there')} instead of {known.get(odd[0], 'nothing')}; leave"
            " options of the model out"
        )
