"""Parameters in the runs of adapters: a LoRA or the vectors of a word, beside a frozen model."""

from typing import TypeGuard

import jax
import jax.numpy as jnp
from etils import epath

from ldm_jax import schema, shapes
from ldm_jax.adapters import lora
from ldm_jax.runtime import checkpoint, rundir


def trains_adapter(config: object) -> TypeGuard[schema.AdapterTrainConfig]:
    """True for the config of a recipe that leaves the model's own weights as they are."""
    if isinstance(config, schema.DreamBoothTrainConfig):
        return config.lora.rank > 0
    return isinstance(config, schema.AdapterTrainConfig)


def base_shapes(config: schema.AdapterTrainConfig) -> dict:
    """{"unet", "cond_stage"}: shapes of the frozen model."""
    return {"unet": shapes.unet(config.unet), "cond_stage": shapes.cond(config.cond)}


def init_params(config: schema.AdapterTrainConfig, key: jax.Array) -> dict:
    """{"lora": as of `lora.to_tree`} or {"embedding": {"vectors"}}, which change nothing yet."""
    if isinstance(config, schema.TextualInversionTrainConfig):
        text = schema.text_of(config.cond)
        width = 0 if text is None else text.encoder.width
        return {"embedding": {"vectors": jnp.zeros((config.vectors, width))}}
    settings: schema.LoRAConfig = getattr(config, "lora")  # noqa: B009
    made = lora.init(
        base_shapes(config),
        settings.rank,
        settings.targets,
        key,
        alpha=settings.alpha,
        text_encoder=settings.text_encoder,
        initial=settings.init,
    )
    return {"lora": lora.to_tree(made)}


def trained_shapes(config: schema.AdapterTrainConfig) -> dict:
    """Shapes of `init_params`."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda key: init_params(config, key), key)


def lora_of(run: epath.PathLike, step: int | None = None, ema: bool = True) -> lora.LoRA:
    """The LoRA that a run trained, the newest or that of `step`; with `ema` its average, if any.

    ValueError for another run.
    """
    config = rundir.read_config(run) if rundir.is_run(run) else None
    settings = getattr(config, "lora", None)
    if settings is None or not trains_adapter(config):
        raise ValueError(f"{run}: is not a run that trained a LoRA")
    params, _ = checkpoint.trained(run, trained_shapes(config), step, ema)
    return lora.from_tree(params["lora"], settings.alpha)
