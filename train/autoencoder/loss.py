"""A first stage in training: its state, its loss and its step, with a discriminator or without.

`autoencoder.py` and `modules/losses` of the reference; section 3.1 of the paper.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ldm_jax import losses, schema, sharding, train_state
from ldm_jax.models import quantize
from ldm_jax.train import step
from ldm_jax.train.autoencoder import adversary, codebook, reconstruction
from ldm_jax.train_state import GanState

DRAWS = ("encode", "dropout", "disc_encode", "disc_dropout")  # one key per example for each
REVIVE = "revive"  # one key for all revived codes
DISCRIMINATOR = 1  # folded into the key of INIT


def init_params(config: schema.AutoencoderTrainConfig, key: jax.Array) -> dict:
    """Fresh {"autoencoder", "logvar"}; the reference's fixed logvar is not a parameter."""
    side = config.model.downsample
    image = jnp.zeros((1, side, side, config.model.in_channels))
    params = {"autoencoder": reconstruction.module(config).init(key, image)["params"]}
    if config.loss.learn_logvar:
        params["logvar"] = jnp.asarray(config.loss.logvar_init)
    return params


class Optimizers(NamedTuple):
    """Optimizers of the autoencoder and of the discriminator (None without one)."""

    tx: optax.GradientTransformation
    disc_tx: optax.GradientTransformation | None
    learning_rate: Callable


def make_optimizers(config: schema.AutoencoderTrainConfig) -> Optimizers:
    """The optimizers of a config; encoder and codebook are frozen where only the decoder trains."""
    tx, learning_rate = train_state.make_optimizer(config.optimizer)
    disc_tx = None
    if config.discriminator is not None:
        disc_tx, _ = train_state.make_optimizer(config.disc_optimizer or config.optimizer)
    if config.train_only == "decoder":
        tx = optax.partition({"trains": tx, "stays": optax.set_to_zero()}, _labels)
    return Optimizers(tx, disc_tx, learning_rate)


def _labels(params: dict) -> dict:
    """Label of every parameter, "trains" or "stays", where only the decoder trains."""
    parts = {n: "trains" if n in reconstruction.DECODER else "stays" for n in params["autoencoder"]}
    stage = {n: jax.tree.map(lambda _, n=n: parts[n], p) for n, p in params["autoencoder"].items()}
    return {n: stage if n == "autoencoder" else "trains" for n in params}


def fresh(config: schema.AutoencoderTrainConfig, key: jax.Array) -> GanState:
    """A new state, on one device; without an adversary the discriminator's trees are empty."""
    optimizers = make_optimizers(config)
    params = init_params(config, key)
    disc_params, disc_stats = adversary.fresh(config, jax.random.fold_in(key, DISCRIMINATOR))
    return train_state.create_gan(
        params,
        optimizers.tx,
        config.ema,
        disc_params=disc_params,
        disc_tx=optimizers.disc_tx,
        disc_stats=disc_stats,
        codes=codebook.start(config, params),
    )


def abstract_state(config: schema.AutoencoderTrainConfig, mesh: Mesh) -> tuple[GanState, GanState]:
    """(shapes, shardings) of the state, without computing anything."""
    return sharding.abstract(functools.partial(fresh, config), mesh)


def init_state(
    config: schema.AutoencoderTrainConfig, key: jax.Array, mesh: Mesh
) -> tuple[GanState, GanState]:
    """(state, its shardings), created sharded."""
    return sharding.init_sharded(functools.partial(fresh, config), key, mesh)


def make_loss(
    config: schema.AutoencoderTrainConfig, mesh: Mesh, perceptual: dict | None = None
) -> step.Loss:
    """loss(frozen, params, examples, train) -> (mean loss, metrics) of one microbatch.

    `perceptual` are the parameters of LPIPS on the mesh, needed where it has a weight. `frozen` is
    {"perceptual"} and, for an adversarial loss, {"disc_params", "disc_stats", "disc_factor"}:
    arrays without a gradient. `examples` is {"batch": {"image"}, "keys": {draw: [B] keys}}.
    Metrics hold "examples" of a quantized stage, and "batch_stats" of an adversarial one.
    """
    reconstruct, nll = reconstruction.make(config, mesh), reconstruction.make_nll(config)
    judge = adversary.make_judge(config) if config.discriminator is not None else None

    def loss(frozen: dict, params: dict, examples: step.Examples, train: bool) -> tuple:
        image, keys = examples["batch"]["image"], examples["keys"]
        perceptual, params = sharding.all_gather((frozen["perceptual"], params), mesh)
        outputs = reconstruct(params, image, keys["encode"], keys["dropout"][0], train)
        logvar = params.get("logvar", jnp.asarray(config.loss.logvar_init))
        likelihood = functools.partial(nll, perceptual, image)
        if judge is None or not train:
            value, metrics = likelihood(outputs.image, logvar)
            metrics = {**metrics, "nll_loss": value}
        else:

            def generator(image: jax.Array) -> tuple[jax.Array, dict]:
                stats = frozen["disc_stats"]["batch_stats"]
                disc_params = sharding.all_gather(frozen["disc_params"], mesh)
                logits, stats = judge(disc_params, stats, image)
                return losses.generator(logits), stats

            value, terms, (metrics, batch_stats) = losses.adversarial(
                likelihood,
                generator,
                outputs.image,
                logvar,
                outputs.features,
                config.loss.disc_weight,
                frozen["disc_factor"],
            )
            metrics = {**metrics, "nll_loss": terms["nll"], "g_loss": terms["generator"]}
            metrics |= {"d_weight": terms["d_weight"], "batch_stats": batch_stats}
        value += outputs.regularization
        metrics |= {"loss": value, **outputs.metrics}
        if outputs.indices is not None:
            metrics["examples"] = {"z": outputs.z, "indices": outputs.indices}
        return value, metrics

    # not per example: BatchNorm and the adaptive weight depend on the whole batch, so XLA splits it
    return step.Loss(loss, {"perceptual": perceptual or {}}, DRAWS, gathers=True)


def make_train_step(
    config: schema.AutoencoderTrainConfig, mesh: Mesh, perceptual: dict | None = None
) -> step.Step:
    """step(state, batch, key) -> (state, metrics): `step.make_step` with codebook and adversary.

    The discriminator is updated after the autoencoder, on its new reconstructions.
    """
    tx, disc_tx, _ = make_optimizers(config)
    learn = make_discriminator_update(config, mesh, disc_tx) if disc_tx is not None else None

    def with_state(frozen: dict, state: GanState) -> dict:
        if learn is None:
            return frozen
        weights = config.loss
        return frozen | {
            "disc_params": state.disc_params,
            "disc_stats": state.disc_stats,
            "disc_factor": losses.adopted(weights.disc_factor, state.step, weights.disc_start),
        }

    def finish(
        old: GanState, new: GanState, metrics: dict, examples: step.Examples, key: jax.Array
    ) -> tuple[GanState, dict, list[jax.Array]]:
        by_example, batch_stats = metrics.pop("examples", None), metrics.pop("batch_stats", None)
        revive = train_state.step_keys(key, old.step, (REVIVE,))[REVIVE]
        new, of_codebook = _after_update(config, old, new, by_example, revive)
        metrics |= of_codebook
        total, disc_norm = metrics["loss"], jnp.zeros(())
        if learn is not None:
            new, of_disc = learn(new, batch_stats, old.step, examples)
            metrics |= of_disc
            total, disc_norm = total + of_disc["disc_loss"], of_disc["disc_grad_norm"]
        return new, {**metrics, "total": total}, [disc_norm]

    loss = make_loss(config, mesh, perceptual)
    return step.make_step(loss, tx, config, mesh, with_state=with_state, finish=finish)


def _after_update(
    config: schema.AutoencoderTrainConfig, old: GanState, new: GanState, codes: Any, key: jax.Array
) -> tuple[GanState, dict]:
    """(state with its codebook and moving average updated, metrics of the codebook)."""
    if not codebook.trains(config):
        ema = train_state.update_ema(config.ema, old.ema_params, new.params, old.step)
        return new.replace(ema_params=ema), {}
    updated = codebook.update(config, new.params, new.opt_state, old.codes, codes, key)
    ema = train_state.update_ema(config.ema, old.ema_params, updated.params, old.step)
    new = new.replace(
        params=updated.params,
        ema_params=codebook.follow(ema, updated),
        opt_state=updated.opt_state,
        codes=updated.codes,
    )
    return new, updated.metrics


def make_discriminator_update(
    config: schema.AutoencoderTrainConfig, mesh: Mesh, tx: optax.GradientTransformation
) -> Callable:
    """learn(state, batch_stats, step, examples) -> (state, metrics): the discriminator's update.

    `state` has the autoencoder's new parameters, `batch_stats` comes from its own loss. As in the
    reference, images are reconstructed again, from other samples of the posterior.
    """
    reconstruct, loss = reconstruction.make(config, mesh), adversary.make_loss(config)

    def learn(state: GanState, batch_stats: dict, step: jax.Array, examples: dict) -> tuple:
        before = adversary.take_in(state.disc_stats, batch_stats)

        def disc_loss(params: dict, examples: dict) -> tuple[jax.Array, dict]:
            image, keys = examples["batch"]["image"], examples["keys"]
            dropout = keys["disc_dropout"][0]
            params, generator = sharding.all_gather((params, state.params), mesh)
            outputs = reconstruct(generator, image, keys["disc_encode"], dropout, True)
            return loss(params, before, image, jax.lax.stop_gradient(outputs.image), step)

        grads, metrics = train_state.gradients(
            disc_loss, state.disc_params, examples, config.accumulate
        )
        del metrics["loss"]  # weighted
        updates, opt_state = tx.update(grads, state.disc_opt_state, state.disc_params)
        started = step >= config.loss.disc_start  # before, weight decay alone would change it
        updates = jax.tree.map(lambda u: jnp.where(started, u, 0.0), updates)
        stats = adversary.take_in(before, metrics.pop("batch_stats"), metrics)
        new = state.replace(
            disc_params=optax.apply_updates(state.disc_params, updates),
            disc_opt_state=opt_state,
            disc_stats=stats,
        )
        return new, {**metrics, "disc_grad_norm": optax.tree.norm(grads)}

    return learn


def make_eval_step(
    config: schema.AutoencoderTrainConfig, mesh: Mesh, perceptual: dict | None = None
) -> Callable:
    """evaluate(params, batch) -> metrics of held-out images, of a KL posterior's mode.

    A quantized stage also gives "count_n", the number of times each code was taken.
    """
    loss = make_loss(config, mesh, perceptual)

    def evaluate(frozen: dict, params: dict, batch: dict) -> dict:
        # required, but the posterior's mode draws nothing
        key = train_state.example_keys(jax.random.key(0), config.batch_size)
        examples = {"batch": {"image": batch["image"]}, "keys": dict.fromkeys(DRAWS, key)}
        _, metrics = loss(frozen, params, examples, False)
        latents = metrics.pop("examples", None)
        if latents is not None:
            taken = quantize.assigned(latents["z"], latents["indices"], config.model.num_codes)
            metrics["count_n"] = taken.count_n
        return metrics

    jitted = jax.jit(evaluate, out_shardings=sharding.replicated(mesh))
    return functools.partial(jitted, loss.frozen)
