"""Trains a first stage: reconstruction, KL or codebook, LPIPS and a discriminator.

`autoencoder.py` and `modules/losses` of the reference; section 3.1 of the paper.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh

from ldm_jax import data, losses, schema, sharding, train_state
from ldm_jax.models import quantize
from ldm_jax.runtime import checkpoint, rundir
from ldm_jax.runtime.log import LOG
from ldm_jax.schema import serialize
from ldm_jax.train.autoencoder import adversary, checks, codebook, held_out, initial, reconstruction
from ldm_jax.train.run import logs, loop, startup
from ldm_jax.train.run.watchdog import Watch
from ldm_jax.train_state import GanState

DRAWS = ("encode", "dropout", "disc_encode", "disc_dropout")  # one key per row for each
REVIVE = "revive"  # and one key for all that is revived
INIT, TRAIN = range(2)  # folded into the root key: one stream per purpose
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
    """Of the autoencoder and of the discriminator (None without one)."""

    tx: optax.GradientTransformation
    disc_tx: optax.GradientTransformation | None
    learning_rate: Callable


def make_optimizers(config: schema.AutoencoderTrainConfig) -> Optimizers:
    """What moves the parameters; encoder and codebook stay where only the decoder trains."""
    tx, learning_rate = train_state.make_optimizer(config.optimizer)
    disc_tx = None
    if config.discriminator is not None:
        disc_tx, _ = train_state.make_optimizer(config.disc_optimizer or config.optimizer)
    if config.train_only == "decoder":
        tx = optax.partition({"trains": tx, "stays": optax.set_to_zero()}, _labels)
    return Optimizers(tx, disc_tx, learning_rate)


def _labels(params: dict) -> dict:
    """Of every parameter "trains" or "stays", where only the decoder trains."""
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
    shapes = jax.eval_shape(functools.partial(fresh, config), jax.random.key(0))
    return shapes, sharding.by_rules(shapes, sharding.RULES, mesh)


def init_state(
    config: schema.AutoencoderTrainConfig, key: jax.Array, mesh: Mesh
) -> tuple[GanState, GanState]:
    """(state, its shardings): born sharded."""
    _, shardings = abstract_state(config, mesh)
    return jax.jit(functools.partial(fresh, config), out_shardings=shardings)(key), shardings


def make_loss(config: schema.AutoencoderTrainConfig, mesh: Mesh) -> Callable:
    """loss(frozen, params, rows, train) -> (mean loss, metrics) of one microbatch.

    `frozen` is {"perceptual"} and, for an adversarial loss, {"disc_params", "disc_stats",
    "disc_factor"}: arrays without a gradient. `rows` is {"batch": {"image"}, "keys": {draw: [B]
    keys}}. Metrics hold "rows" of a quantized stage, and "batch_stats" of an adversarial one.
    """
    reconstruct, nll = reconstruction.make(config, mesh), reconstruction.make_nll(config)
    judge = adversary.make_judge(config) if config.discriminator is not None else None

    def loss(frozen: dict, params: dict, rows: dict, train: bool) -> tuple[jax.Array, dict]:
        image, keys = rows["batch"]["image"], rows["keys"]
        perceptual, params = sharding.all_gather((frozen["perceptual"], params), mesh)
        found = reconstruct(params, image, keys["encode"], keys["dropout"][0], train)
        logvar = params.get("logvar", jnp.asarray(config.loss.logvar_init))
        likelihood = functools.partial(nll, perceptual, image)
        if judge is None or not train:
            value, metrics = likelihood(found.image, logvar)
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
                found.image,
                logvar,
                found.features,
                config.loss.disc_weight,
                frozen["disc_factor"],
            )
            metrics = {**metrics, "nll_loss": terms["nll"], "g_loss": terms["generator"]}
            metrics |= {"d_weight": terms["d_weight"], "batch_stats": batch_stats}
        value += found.regularization
        metrics |= {"loss": value, **found.metrics}
        if found.indices is not None:
            metrics["rows"] = {"z": found.z, "indices": found.indices}
        return value, metrics

    return loss


def make_train_step(
    config: schema.AutoencoderTrainConfig, mesh: Mesh, perceptual: dict | None = None
) -> Callable:
    """step(state, batch, key) -> (state, metrics), jitted; donates the state it is given.

    `perceptual` are the parameters of LPIPS on the mesh, needed where it has a weight. The
    discriminator learns after the autoencoder and sees what that makes of the batch by then.
    """
    optimizers = make_optimizers(config)
    loss = make_loss(config, mesh)
    judges = config.discriminator is not None
    learn = make_discriminator_update(config, mesh, optimizers.disc_tx) if judges else None

    def step(perceptual: dict, state: GanState, batch: dict, key: jax.Array) -> tuple:
        key = jax.random.fold_in(key, TRAIN)
        keys = train_state.step_keys(key, state.step, (*DRAWS, REVIVE))
        revive = keys.pop(REVIVE)
        rows = {
            "batch": {"image": batch["image"]},
            "keys": {n: train_state.row_keys(k, config.batch_size) for n, k in keys.items()},
        }
        frozen = {"perceptual": perceptual}
        if judges:
            weights = config.loss
            factor = losses.adopted(weights.disc_factor, state.step, weights.disc_start)
            frozen |= {
                "disc_params": state.disc_params,
                "disc_stats": state.disc_stats,
                "disc_factor": factor,
            }
        grads, metrics = train_state.gradients(
            lambda params, rows: loss(frozen, params, rows, True),
            state.params,
            rows,
            config.accumulate,
        )
        by_row, batch_stats = metrics.pop("rows", None), metrics.pop("batch_stats", None)
        norm = optax.tree.norm(grads)
        updates, opt_state = optimizers.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        new, found = _after_update(config, state, new, by_row, revive)
        metrics |= found | {
            "grad_norm": norm,
            "learning_rate": optimizers.learning_rate(state.step),
        }
        value, disc_norm = metrics["loss"], jnp.zeros(())
        if judges:
            new, found = learn(new, batch_stats, state.step, rows)
            metrics |= found
            value, disc_norm = value + found["disc_loss"], found["disc_grad_norm"]
        new = train_state.keep_or_skip(config.spikes, value, [norm, disc_norm], new, state)
        counts = {"bad_steps": new.bad_steps, "skipped_steps": new.skips["count"]}
        return new, metrics | counts

    _, shardings = abstract_state(config, mesh)
    jitted = jax.jit(step, donate_argnums=1, out_shardings=(shardings, sharding.replicated(mesh)))
    return functools.partial(jitted, perceptual or {})


def _after_update(
    config: schema.AutoencoderTrainConfig, old: GanState, new: GanState, rows: dict, key: jax.Array
) -> tuple[GanState, dict]:
    """(state with its codebook and average brought up to date, metrics of the codebook)."""
    if not codebook.trains(config):
        ema = train_state.update_ema(config.ema, old.ema_params, new.params, old.step)
        return new.replace(ema_params=ema), {}
    found = codebook.update(config, new.params, new.opt_state, old.codes, rows, key)
    ema = train_state.update_ema(config.ema, old.ema_params, found.params, old.step)
    new = new.replace(
        params=found.params,
        ema_params=codebook.follow(ema, found),
        opt_state=found.opt_state,
        codes=found.codes,
    )
    return new, found.metrics


def make_discriminator_update(
    config: schema.AutoencoderTrainConfig, mesh: Mesh, tx: optax.GradientTransformation
) -> Callable:
    """learn(state, batch_stats, step, rows) -> (state, metrics): the discriminator's update.

    `state` has the autoencoder's new parameters, `batch_stats` comes from its own loss. As in the
    reference the reconstructions are made anew, of other samples of the posterior.
    """
    reconstruct, loss = reconstruction.make(config, mesh), adversary.make_loss(config)

    def learn(state: GanState, batch_stats: dict, step: jax.Array, rows: dict) -> tuple:
        before = adversary.take_in(state.disc_stats, batch_stats)

        def disc_loss(params: dict, rows: dict) -> tuple[jax.Array, dict]:
            image, keys = rows["batch"]["image"], rows["keys"]
            dropout = keys["disc_dropout"][0]
            params, generator = sharding.all_gather((params, state.params), mesh)
            found = reconstruct(generator, image, keys["disc_encode"], dropout, True)
            return loss(params, before, image, jax.lax.stop_gradient(found.image), step)

        grads, metrics = train_state.gradients(
            disc_loss, state.disc_params, rows, config.accumulate
        )
        del metrics["loss"]  # weighted
        updates, opt_state = tx.update(grads, state.disc_opt_state, state.disc_params)
        started = step >= config.loss.disc_start  # before it, weight decay would go on alone
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

    A quantized stage also gives "count_n", how often each code was taken.
    """
    loss = make_loss(config, mesh)

    def evaluate(perceptual: dict, params: dict, batch: dict) -> dict:
        key = train_state.row_keys(jax.random.key(0), config.batch_size)  # drawn from by nothing
        rows = {"batch": {"image": batch["image"]}, "keys": dict.fromkeys(DRAWS, key)}
        _, metrics = loss({"perceptual": perceptual}, params, rows, False)
        found = metrics.pop("rows", None)
        if found is not None:
            taken = quantize.assigned(found["z"], found["indices"], config.model.num_codes)
            metrics["count_n"] = taken.count_n
        return metrics

    jitted = jax.jit(evaluate, out_shardings=sharding.replicated(mesh))
    return functools.partial(jitted, perceptual or {})


def train(
    config: schema.AutoencoderTrainConfig, workdir: epath.PathLike, watch: Watch | None = None
) -> int:
    """Trains until `config.steps` in `workdir`, going on where it stopped; returns an exit code."""
    started = time.time()
    mesh = sharding.make_mesh(config.mesh)
    root = jax.random.key(config.seed)
    stream = data.stream(config.data, batch_size=config.batch_size, seed=config.seed)
    eval_stream = data.stream(
        config.data, batch_size=config.batch_size, seed=config.seed, split="eval"
    )
    checks.first_stage(config, stream, mesh)
    shapes, shardings = abstract_state(config, mesh)
    perceptual = reconstruction.find_perceptual(config, workdir)
    given = initial.find(config, workdir, shapes)
    # only now is anything written: a wrong config leaves no run behind that refuses the right one
    run, changes = rundir.open_run(workdir, config)
    logs.begin(run)
    for change in changes:
        LOG.info(f"changed on resume: {change}")

    reconstruction.keep_perceptual(config, run, perceptual)
    perceptual = sharding.place(perceptual, sharding.by_rules(perceptual, sharding.RULES, mesh))
    manager = checkpoint.manager(run, config.max_to_keep, config.max_failed_saves)
    state = checkpoint.resume(manager, sharding.with_shardings(shapes, shardings))
    saved = None if state is None else int(state.step)
    if state is None:
        state, _ = init_state(config, jax.random.fold_in(root, INIT), mesh)
        if given is not None:
            state = initial.start(config, state, shardings, given)
            LOG.info(f"starts from {config.init_from}; trains {config.train_only}")
    else:
        rundir.drop_metrics_after(run, int(state.step))
    startup.report(config, mesh, state, stream)
    if loop.ended(config, run, state):
        return 0

    evaluate_batch = make_eval_step(config, mesh, perceptual)
    evaluate_params = held_out.make_evaluate(config, mesh, evaluate_batch, eval_stream)

    def evaluate(state: GanState) -> dict[str, float]:
        values = evaluate_params(state.params, "")
        if state.ema_params:
            values |= evaluate_params(loop.averaged(state), "_ema")
        return values

    job = loop.Job(
        config=config,
        started=started,
        run=run,
        mesh=mesh,
        root=root,
        stream=stream,
        manager=manager,
        train_step=make_train_step(config, mesh, perceptual),
        model_step=lambda: make_train_step(loop.plain(config), mesh, perceptual),
        evaluate=evaluate,
        draw=held_out.make_preview(config, mesh, eval_stream),
        section=serialize.to_dict(config.model),
        watch=watch or Watch(),
    )
    return loop.run(job, state, saved)
