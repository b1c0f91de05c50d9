"""First stages: `loss` is the method, `loop` the recipe."""

from ldm_jax.train.autoencoder.loop import train
from ldm_jax.train.autoencoder.loss import (
    DRAWS,
    abstract_state,
    fresh,
    init_params,
    init_state,
    make_eval_step,
    make_loss,
    make_train_step,
)

__all__ = [
    "DRAWS",
    "abstract_state",
    "fresh",
    "init_params",
    "init_state",
    "make_eval_step",
    "make_loss",
    "make_train_step",
    "train",
]
