"""First stages: reconstruction, KL or codebook, LPIPS and a discriminator."""

from ldm_jax.train.autoencoder.recipe import (
    DRAWS,
    TRAIN,
    abstract_state,
    fresh,
    init_params,
    init_state,
    make_eval_step,
    make_loss,
    make_train_step,
    train,
)

__all__ = [
    "DRAWS",
    "TRAIN",
    "abstract_state",
    "fresh",
    "init_params",
    "init_state",
    "make_eval_step",
    "make_loss",
    "make_train_step",
    "train",
]
