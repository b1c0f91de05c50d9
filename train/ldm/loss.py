"""A latent diffusion model in training: its parts, and the loss of a batch (`ddpm.py`).

Section 3.2 of the paper: the first stage is frozen, the UNet denoises its latents.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ldm_jax import conditioning, diffusion, latents, schema, sharding, train_state
from ldm_jax.models import attention, convolution, unet
from ldm_jax.train import step
from ldm_jax.train.frozen import Frozen, first_stage, text_encoder
from ldm_jax.train_state import TrainState

DRAWS = step.DRAWS  # one key per example for each


def modules(config: schema.LatentDiffusionTrainConfig, mesh: Mesh | None = None) -> tuple[Any, Any]:
    """(UNet, cond_stage or None) as the recipe runs them on the mesh's devices."""
    platform = mesh.devices.flat[0].platform if mesh is not None else "cpu"
    net = unet.from_config(
        config.unet,
        dtype=jnp.dtype(config.dtype),
        attention=attention.choose(platform, mesh, config.attention),
        convolution=convolution.choose(platform),
        remat=config.remat,
    )
    return net, conditioning.build(config.cond, jnp.dtype(config.dtype), config.remat)


def init_params(config: schema.LatentDiffusionTrainConfig, key: jax.Array) -> dict:
    """Fresh {"unet", "cond_stage", "logvar"}, with only the parts that train."""
    net, cond_stage = modules(config)
    unet_key, cond_key = jax.random.split(key)
    side = 2 ** (len(config.unet.channel_mult) - 1)
    x = jnp.zeros((1, side, side, config.unet.in_channels))
    context = config.unet.context_dim and jnp.zeros((1, 1, config.unet.context_dim))
    label = None
    if config.unet.num_classes is not None:
        label = jnp.zeros((1,), jnp.int32)
    elif config.unet.vector_dim is not None:
        label = jnp.zeros((1, config.unet.vector_dim))
    params = {"unet": net.init(unet_key, x, jnp.zeros((1,)), context, label)["params"]}
    if cond_stage is not None and text_encoder.trains(config.cond):
        params["cond_stage"] = conditioning.init(config.cond, cond_stage, cond_key)
    if config.diffusion.learn_logvar:
        params["logvar"] = jnp.full((config.diffusion.timesteps,), config.diffusion.logvar_init)
    return params


def make_optimizer(config: schema.LatentDiffusionTrainConfig) -> optax.GradientTransformation:
    """The optimizer of all that trains, the conditioning at a rate of its own if it has one."""
    tx, _ = train_state.make_optimizer(config.optimizer)
    if config.cond_learning_rate is None:
        return tx
    if not config.optimizer.learning_rate:
        raise ValueError(
            "--cond-learning-rate goes with an --optimizer.learning-rate above 0, whose schedule"
            " it follows"
        )
    # AdamW's updates are proportional to the rate
    ratio = config.cond_learning_rate / config.optimizer.learning_rate

    def scale(updates: dict, params: dict | None) -> dict:
        if "cond_stage" not in updates:
            raise ValueError("--cond-learning-rate: the conditioning of this model does not train")
        return {**updates, "cond_stage": optax.tree.scale(ratio, updates["cond_stage"])}

    return optax.chain(tx, optax.stateless(scale))


def fresh(config: schema.LatentDiffusionTrainConfig, key: jax.Array) -> TrainState:
    """A new state, on one device."""
    return train_state.create(init_params(config, key), make_optimizer(config), config.ema)


def abstract_state(
    config: schema.LatentDiffusionTrainConfig, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """(shapes, shardings) of the state, without computing anything."""
    return sharding.abstract(functools.partial(fresh, config), mesh)


def init_state(
    config: schema.LatentDiffusionTrainConfig, key: jax.Array, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """(state, its shardings), created sharded."""
    return sharding.init_sharded(functools.partial(fresh, config), key, mesh)


def make_loss(config: schema.LatentDiffusionTrainConfig, frozen: Frozen, mesh: Mesh) -> step.Loss:
    """loss(frozen_params, params, examples, train) -> (mean loss, metrics) of one microbatch.

    `params` are already gathered along fsdp. `examples` is {"batch": {...}, "keys": {draw: [B]
    keys}}: every draw but dropout's depends on its example's key.
    """
    losses = make_losses(config, frozen, mesh)

    def loss(frozen_params: dict, params: dict, examples: step.Examples, train: bool) -> tuple:
        loss_b, metrics = losses(frozen_params, params, examples, train)
        return jnp.mean(loss_b), {"loss": jnp.mean(loss_b), **metrics}

    # dropout draws one mask for a microbatch, the same on every mesh
    return step.Loss(loss, frozen.arguments, DRAWS, per_example=not config.unet.dropout)


def make_losses(
    config: schema.LatentDiffusionTrainConfig, frozen: Frozen, mesh: Mesh
) -> Callable[..., tuple[jax.Array, dict]]:
    """losses(frozen_params, params, examples, train) -> ([B] losses, mean metrics).

    As `make_loss`, before the mean. Parts that `params` lack are taken from `frozen_params`.
    """
    net, cond_stage = modules(config, mesh)
    schedule = diffusion.from_config(config.diffusion)

    def losses(frozen_params: dict, params: dict, examples: step.Examples, train: bool) -> tuple:
        batch, keys = examples["batch"], examples["keys"]
        encode = functools.partial(
            latents.encode, frozen.module, frozen_params["first_stage"], scale=frozen.scale
        )
        # no gradient passes the frozen first stage, so that none of its activations are kept
        x0 = jax.lax.stop_gradient(
            first_stage.latent(frozen.module, frozen_params, batch, frozen.scale, keys["encode"])
        )
        t = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(schedule.betas)))(keys["t"])
        noise = diffusion.rowwise_normal(keys["noise"], x0.shape[1:])
        if config.diffusion.offset_noise:
            offset = diffusion.rowwise_normal(keys["offset"], x0.shape[-1:])
            noise = diffusion.add_offset(noise, offset, config.diffusion.offset_noise)
        dropped = False
        if train and config.cond is not None and config.cond.dropout:
            dropped = jax.vmap(jax.random.uniform)(keys["drop_cond"]) < config.cond.dropout
        cond_params = params.get("cond_stage") or frozen_params.get("cond_stage", {})
        cond = conditioning.from_batch(config.cond, cond_stage, cond_params, batch, encode, dropped)
        x_t = diffusion.q_sample(schedule, x0, t, noise)
        if cond.concat is not None:  # beside the noised latent, itself without noise
            x_t = jnp.concatenate([x_t, cond.concat], axis=-1)
        out = net.apply(
            {"params": params["unet"]},
            x_t,
            t,
            cond.context,
            cond.label,
            train=train,
            rngs={"dropout": keys["dropout"][0]},
        ).astype(jnp.float32)
        return diffusion.training_loss(
            schedule, config.diffusion, out, x0, noise, t, params.get("logvar")
        )

    return losses


def make_train_step(
    config: schema.LatentDiffusionTrainConfig, frozen: Frozen, mesh: Mesh
) -> step.Step:
    """step(state, batch, key) -> (state, metrics): `step.make_step` of this recipe's loss."""
    return step.make_step(make_loss(config, frozen, mesh), make_optimizer(config), config, mesh)


def make_eval_step(
    config: schema.LatentDiffusionTrainConfig,
    frozen: Frozen,
    mesh: Mesh,
    loss: step.Loss | None = None,
) -> Callable:
    """evaluate(params, batch, key) -> held-out loss: a key gives the same t and noise each time.

    loss: default: that of `make_loss`.
    """
    loss = make_loss(config, frozen, mesh) if loss is None else loss

    def evaluate(frozen_params: dict, params: dict, batch: dict, key: jax.Array) -> jax.Array:
        examples = step.with_keys(key, 0, DRAWS, batch, config.batch_size)
        frozen_params, params = sharding.all_gather((frozen_params, params), mesh)
        return loss(frozen_params, params, examples, False)[0]

    jitted = jax.jit(evaluate, out_shardings=sharding.replicated(mesh))
    return functools.partial(jitted, frozen.arguments)
