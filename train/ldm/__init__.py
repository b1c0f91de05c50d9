"""Latent diffusion on a frozen first stage: `loss` is the method, `loop` the recipe."""

from ldm_jax.train.ldm.loop import check, train
from ldm_jax.train.ldm.loss import (
    DRAWS,
    abstract_state,
    init_params,
    init_state,
    make_eval_step,
    make_loss,
    make_losses,
    make_optimizer,
    make_train_step,
    modules,
)

__all__ = [
    "DRAWS",
    "abstract_state",
    "check",
    "init_params",
    "init_state",
    "make_eval_step",
    "make_loss",
    "make_losses",
    "make_optimizer",
    "make_train_step",
    "modules",
    "train",
]
