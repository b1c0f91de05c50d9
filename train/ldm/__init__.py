"""Latent diffusion on a frozen first stage."""

from ldm_jax.train.ldm.recipe import (
    DRAWS,
    NEEDS,
    NEEDS_IMAGE,
    abstract_state,
    check,
    init_params,
    init_state,
    make_eval_step,
    make_loss,
    make_train_step,
    modules,
    train,
)

__all__ = [
    "DRAWS",
    "NEEDS",
    "NEEDS_IMAGE",
    "abstract_state",
    "check",
    "init_params",
    "init_state",
    "make_eval_step",
    "make_loss",
    "make_train_step",
    "modules",
    "train",
]
