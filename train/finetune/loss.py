"""The loss of finetuning: that of latent diffusion, and beside it that of pictures of the class.

loss = mean over the subject's pictures + prior_weight mean over the class's pictures
    (Ruiz et al. 2023, equation 2, with the prior's own t and noise)
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ldm_jax import schema
from ldm_jax.train import ldm, step
from ldm_jax.train.finetune import adapter
from ldm_jax.train.frozen import Frozen

PRIOR = "prior_"
"""Before the names of a batch's arrays of the class."""
SECOND = 1  # folded into an example's keys: the draws of its picture of the class


def has_prior(config: schema.AdapterTrainConfig) -> bool:
    """True if pictures of the class train too."""
    return isinstance(config, schema.DreamBoothTrainConfig) and bool(config.class_prompt)


def make_loss(config: schema.AdapterTrainConfig, frozen: Frozen, mesh: Mesh) -> step.Loss:
    """loss(frozen_params, params, examples, train) -> (mean loss, metrics) of one microbatch.

    As `train.ldm.make_loss`, of what `adapter.init_params` makes. With pictures of the class the
    batch holds, as many, `prior_image` and `prior_tokens`. Held-out losses are the subject's alone.
    """
    losses = ldm.make_losses(config, frozen, mesh)
    whole = adapter.make_whole(config)
    settings = getattr(config, "lora", schema.LoRAConfig())

    def loss(frozen_params: dict, params: dict, examples: step.Examples, train: bool) -> tuple:
        key = examples["keys"]["dropout"][0] if train else None
        params = whole(frozen_params, params, key)
        if not (train and has_prior(config)):
            loss_b, metrics = losses(frozen_params, params, examples, train)
            return jnp.mean(loss_b), {"loss": jnp.mean(loss_b), **metrics}
        loss_b, metrics = losses(frozen_params, params, with_prior(examples), train)
        subject, prior = (jnp.mean(half) for half in jnp.split(loss_b, 2))
        total = subject + config.prior_weight * prior
        return total, {"loss": total, "loss_subject": subject, "loss_prior": prior, **metrics}

    alone = not config.unet.dropout and not settings.dropout
    return step.Loss(loss, frozen.arguments, ldm.DRAWS, per_example=alone)


def with_prior(examples: step.Examples) -> step.Examples:
    """The examples of the subject, and after them as many of the class, with draws of their own."""
    batch, keys = examples["batch"], examples["keys"]
    own = {name: x for name, x in batch.items() if not name.startswith(PRIOR)}
    of_class = {name: batch.get(PRIOR + name, x) for name, x in own.items()}
    second = jax.vmap(functools.partial(jax.random.fold_in, data=SECOND))
    return {
        "batch": {name: jnp.concatenate([x, of_class[name]]) for name, x in own.items()},
        "keys": {draw: jnp.concatenate([key, second(key)]) for draw, key in keys.items()},
    }


def make_train_step(config: schema.AdapterTrainConfig, frozen: Frozen, mesh: Mesh) -> step.Step:
    """step(state, batch, key) -> (state, metrics): `step.make_step` of this recipe's loss."""
    return step.make_step(make_loss(config, frozen, mesh), ldm.make_optimizer(config), config, mesh)
