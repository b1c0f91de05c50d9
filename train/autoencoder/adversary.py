"""The discriminator of a first stage: its logits of reconstructions, and its own loss.

As in `contperceptual.py` of the reference, BatchNorm sees real and reconstructed images in separate
batches. Under accumulation its batch is a microbatch, and the running statistics take the mean of
the microbatches' statistics.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ldm_jax import losses, schema
from ldm_jax.models import discriminator


def fresh(config: schema.AutoencoderTrainConfig, key: jax.Array) -> tuple[dict, dict]:
    """(parameters, {"batch_stats", "lecam"}) of a new discriminator; ({}, {}) without one."""
    if config.discriminator is None:
        return {}, {}
    net = discriminator.from_config(config.discriminator)
    image = discriminator.smallest_image(net, config.model.out_channels)
    variables = net.init(key, image)
    stats = {"batch_stats": variables["batch_stats"]}
    if config.loss.lecam_weight:
        stats["lecam"] = losses.start_lecam()
    return variables["params"], stats


def make_judge(config: schema.AutoencoderTrainConfig) -> Callable:
    """judge(params, batch_stats, image) -> (logits, batch_stats updated with this batch)."""
    net = discriminator.from_config(config.discriminator, dtype=jnp.dtype(config.dtype))

    def judge(params: dict, batch_stats: dict, image: jax.Array) -> tuple[jax.Array, dict]:
        variables = {"params": params, "batch_stats": batch_stats}
        logits, state = net.apply(variables, image, train=True, mutable=["batch_stats"])
        return logits, state["batch_stats"]

    return judge


def make_loss(config: schema.AutoencoderTrainConfig) -> Callable:
    """loss(params, stats, image, reconstruction, step) -> (scalar, metrics), of a microbatch.

    Metrics: "disc_loss" before regularization and `disc_factor`, "logits_real", "logits_fake",
    "r1" and "lecam" where they have a weight, and "batch_stats", the updated statistics.
    """
    judge, weights = make_judge(config), config.loss

    def loss(
        params: dict, stats: dict, image: jax.Array, reconstruction: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict]:
        real, batch_stats = judge(params, stats["batch_stats"], image)
        fake, batch_stats = judge(params, batch_stats, reconstruction)
        total = losses.DISCRIMINATOR_LOSSES[weights.disc_loss](real, fake)
        metrics = {
            "disc_loss": total,
            "logits_real": jnp.mean(real),
            "logits_fake": jnp.mean(fake),
            "batch_stats": batch_stats,
        }
        if weights.lecam_weight:
            metrics["lecam"] = losses.lecam(stats["lecam"], real, fake)
            total += weights.lecam_weight * metrics["lecam"]
        if weights.r1_weight:
            metrics["r1"] = _r1(params, stats["batch_stats"], image, step)
            total += weights.r1_weight * weights.r1_interval * metrics["r1"]
        return losses.adopted(weights.disc_factor, step, weights.disc_start) * total, metrics

    def _r1(params: dict, batch_stats: dict, image: jax.Array, step: jax.Array) -> jax.Array:
        def penalty() -> jax.Array:
            return losses.r1(lambda x: judge(params, batch_stats, x)[0], image)

        due = (step % weights.r1_interval == 0) & (step >= weights.disc_start)
        return jax.lax.cond(due, penalty, lambda: jnp.zeros(()))

    return loss


def take_in(stats: dict, batch_stats: dict, metrics: dict | None = None) -> dict:
    """The discriminator's {"batch_stats", "lecam"} after batches with these statistics.

    metrics: of the discriminator's own loss; LeCam averages their logits.
    """
    # a mean over microbatches is a float, also that of ActNorm's bool `initialized`
    kept = jax.tree.map(lambda new, old: new.astype(old.dtype), batch_stats, stats["batch_stats"])
    new = {**stats, "batch_stats": kept}
    if "lecam" in stats and metrics is not None:
        logits = (metrics["logits_real"], metrics["logits_fake"])
        new["lecam"] = losses.update_lecam(stats["lecam"], *logits)
    return new
