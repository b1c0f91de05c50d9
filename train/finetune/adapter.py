"""The few numbers that train beside a frozen model, and the model that they make with it.

    state.params          {"lora": {part: tree of "down", "up"}} or {"embedding": {"vectors"}}
    frozen                {"unet", "cond_stage", "first_stage"}
    whole(frozen, params) {"unet", "cond_stage", ...}: arguments of the modules

Without an adapter, in DreamBooth of all weights, `params` are the model's own parts.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
from etils import epath
from jax.sharding import Mesh

from ldm_jax import schema, sharding, train_state
from ldm_jax.adapters import lora, runs, textual_inversion
from ldm_jax.adapters.runs import trains_adapter
from ldm_jax.runtime import checkpoint
from ldm_jax.runtime.log import LOG
from ldm_jax.train import ldm
from ldm_jax.train_state import TrainState

Whole = Callable[..., dict]
"""whole(frozen, params, key=None) -> parameters of the model; the key is that of dropout."""


def check(config: schema.AdapterTrainConfig) -> None:
    """ValueError for numbers of a LoRA that are out of range, or that have no effect."""
    settings = getattr(config, "lora", None)
    if settings is None or not trains_adapter(config):
        return
    if settings.rank < 1:
        raise ValueError(f"--lora.rank {settings.rank}: give at least 1")
    if not 0 <= settings.dropout < 1:
        raise ValueError(f"--lora.dropout {settings.dropout} is not in [0, 1)")
    if settings.text_encoder and schema.text_of(config.cond) is None:
        raise ValueError("--lora.text-encoder: the model is not conditioned on text")


def init_params(config: schema.AdapterTrainConfig, key: jax.Array) -> dict:
    """Fresh parameters: an adapter that changes nothing yet, or those of `train.ldm`."""
    return (runs if trains_adapter(config) else ldm).init_params(config, key)


def fresh(config: schema.AdapterTrainConfig, key: jax.Array) -> TrainState:
    """A new state, on one device."""
    return train_state.create(init_params(config, key), ldm.make_optimizer(config), config.ema)


def abstract_state(config: schema.AdapterTrainConfig, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """(shapes, shardings) of the state, without computing anything."""
    return sharding.abstract(functools.partial(fresh, config), mesh)


def init_state(
    config: schema.AdapterTrainConfig, key: jax.Array, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """(state, its shardings), created sharded."""
    return sharding.init_sharded(functools.partial(fresh, config), key, mesh)


def make_whole(config: schema.AdapterTrainConfig) -> Whole:
    """The function that joins the frozen base and what trains; differentiable in the latter."""
    if not trains_adapter(config):
        return lambda frozen, params, key=None: {**frozen, **params}
    if isinstance(config, schema.TextualInversionTrainConfig):
        return _with_vectors
    return functools.partial(_with_lora, config.lora)


def _with_lora(
    settings: schema.LoRAConfig, frozen: dict, params: dict, key: jax.Array | None = None
) -> dict:
    update = lora.from_tree(params["lora"], settings.alpha)
    if key is not None and settings.dropout:
        update = lora.dropped(update, settings.dropout, key)
    return lora.merged(frozen, [(update, 1.0)])


def _with_vectors(frozen: dict, params: dict, key: jax.Array | None = None) -> dict:
    return textual_inversion.extended(frozen, params["embedding"]["vectors"])


def write_file(config: schema.AdapterTrainConfig, run: epath.Path) -> None:
    """Write what trained as a file that diffusers reads, into the run; nothing for all weights."""
    if not trains_adapter(config):
        return
    # every process reads, as functions of checkpoints ask for; one writes
    if isinstance(config, schema.TextualInversionTrainConfig):
        path = run / f"{config.token.strip('<>')}.safetensors"
        vectors = checkpoint.trained(run, runs.trained_shapes(config))[0]["embedding"]["vectors"]
        word = textual_inversion.Embedding(config.token, vectors)
        write = functools.partial(textual_inversion.write, path, word)
    else:
        path = run / "lora.safetensors"
        write = functools.partial(lora.write, path, runs.lora_of(run), "peft")
    if jax.process_index() == 0:
        write()
    LOG.info(f"written: {path}")


def settled(config: schema.AdapterTrainConfig) -> schema.AdapterTrainConfig:
    """The config with a text encoder that trains only where DreamBooth asks for it."""
    trains = getattr(config, "train_text_encoder", False) and not trains_adapter(config)
    return dataclasses.replace(config, cond=schema.with_text(config.cond, trainable=trains))
