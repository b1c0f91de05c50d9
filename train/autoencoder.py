"""Trains a first stage: reconstruction and KL (`autoencoder.py`; section 3.1 of the paper)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from ldm_jax import (
    checkpoint,
    cli,
    data,
    diffusion,
    images,
    losses,
    rundir,
    schema,
    serialize,
    sharding,
    train_state,
)
from ldm_jax.models import attention, autoencoder
from ldm_jax.train import stop
from ldm_jax.train.monitor import Monitor, compile_step, count_parameters
from ldm_jax.train_state import GanState

DRAWS = ("encode", "dropout")  # one key per row for each
INIT, TRAIN, EVALUATE = range(3)  # folded into the root key: one stream per purpose


def module(config: schema.AutoencoderTrainConfig, mesh: Mesh | None = None) -> Any:
    """The autoencoder as the recipe runs it on the mesh's devices."""
    platform = mesh.devices.flat[0].platform if mesh is not None else "cpu"
    return autoencoder.from_config(
        config.model,
        dtype=jnp.dtype(config.dtype),
        attention=attention.choose(platform, mesh, config.attention),
        remat=config.remat,
    )


def init_params(config: schema.AutoencoderTrainConfig, key: jax.Array) -> dict:
    """Fresh {"autoencoder", "logvar"}; the reference's fixed logvar is not a parameter."""
    side = config.model.downsample
    image = jnp.zeros((1, side, side, config.model.in_channels))
    params = {"autoencoder": module(config).init(key, image)["params"]}
    if config.loss.learn_logvar:
        params["logvar"] = jnp.asarray(config.loss.logvar_init)
    return params


def fresh(config: schema.AutoencoderTrainConfig, key: jax.Array) -> GanState:
    """A new state, on one device; without an adversary the discriminator's trees are empty."""
    tx, _ = train_state.make_optimizer(config.optimizer)
    return train_state.create_gan(init_params(config, key), tx, config.ema)


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
    """loss(params, rows, train) -> (mean loss, metrics) of one microbatch.

    `rows` is {"batch": {"image"}, "keys": {draw: [B] keys}}. Training reconstructs a sample of the
    posterior, evaluation its mode.
    """
    net = module(config, mesh)

    def loss(params: dict, rows: dict, train: bool) -> tuple[jax.Array, dict]:
        image, keys = rows["batch"]["image"], rows["keys"]
        rngs = {"dropout": keys["dropout"][0]}
        apply = functools.partial(
            net.apply, {"params": params["autoencoder"]}, train=train, rngs=rngs
        )
        mean, logvar = (a.astype(jnp.float32) for a in apply(image, method="encode"))
        z = mean
        if train:
            noise = diffusion.rowwise_normal(keys["encode"], mean.shape[1:])
            z = mean + jnp.exp(0.5 * logvar) * noise
        reconstruction = apply(z, method="decode").astype(jnp.float32)
        error_logvar = params.get("logvar", jnp.asarray(config.loss.logvar_init))
        per_row, metrics = losses.first_stage(
            config.loss, image, reconstruction, mean, logvar, error_logvar
        )
        return jnp.mean(per_row), metrics

    return loss


def make_train_step(config: schema.AutoencoderTrainConfig, mesh: Mesh) -> Callable:
    """step(state, batch, key) -> (state, metrics), jitted; donates the state it is given."""
    tx, learning_rate = train_state.make_optimizer(config.optimizer)
    loss = make_loss(config, mesh)

    def step(state: GanState, batch: dict, key: jax.Array) -> tuple[GanState, dict]:
        keys = train_state.step_keys(jax.random.fold_in(key, TRAIN), state.step, DRAWS)
        rows = {
            "batch": {"image": batch["image"]},
            "keys": {n: train_state.row_keys(k, config.batch_size) for n, k in keys.items()},
        }
        grads, metrics = train_state.gradients(
            lambda params, rows: loss(params, rows, True), state.params, rows, config.accumulate
        )
        norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = state.replace(
            step=state.step + 1,
            params=params,
            ema_params=train_state.update_ema(config.ema, state.ema_params, params, state.step),
            opt_state=opt_state,
        )
        new = train_state.keep_if_finite(metrics["loss"], norm, new, state)
        metrics |= {
            "grad_norm": norm,
            "learning_rate": learning_rate(state.step),
            "bad_steps": new.bad_steps,
        }
        return new, metrics

    _, shardings = abstract_state(config, mesh)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
    return functools.partial(jitted)


def make_eval_step(config: schema.AutoencoderTrainConfig, mesh: Mesh) -> Callable:
    """evaluate(params, batch) -> metrics of the posterior's mode on held-out images."""
    loss = make_loss(config, mesh)

    def evaluate(params: dict, batch: dict) -> dict:
        key = train_state.row_keys(jax.random.key(0), config.batch_size)  # drawn from by nothing
        rows = {"batch": {"image": batch["image"]}, "keys": dict.fromkeys(DRAWS, key)}
        return loss(params, rows, False)[1]

    return jax.jit(evaluate, out_shardings=sharding.replicated(mesh))


def make_preview(config: schema.AutoencoderTrainConfig, mesh: Mesh, held_out: Any) -> Callable:
    """draw(params, path): writes held-out images above their reconstructions."""
    net = module(config, mesh)
    image = np.stack([held_out[i]["image"] for i in range(config.num_samples)])

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def reconstruct(params: dict, image: jax.Array) -> jax.Array:
        mean, _ = net.apply({"params": params["autoencoder"]}, image, method="encode")
        return net.apply({"params": params["autoencoder"]}, mean, method="decode")

    def draw(params: dict, path: epath.Path) -> None:
        pictures = np.concatenate([image, np.asarray(reconstruct(params, image), np.float32)])
        if jax.process_index() == 0:
            sheet = images.grid(
                images.to_uint8(pictures),
                config.num_samples,
                scale=max(1, 64 // image.shape[1]),
                names=("image", "decoded"),
            )
            images.save_png(path, sheet)

    return draw


def check(config: schema.AutoencoderTrainConfig, stream: data.Stream, mesh: Mesh) -> None:
    """ValueError if config, data and mesh do not fit each other."""
    if config.steps < 1:
        raise ValueError(f"--steps {config.steps}: give at least 1")
    sharding.check_batch(config.batch_size, mesh, config.accumulate)
    if config.model.in_channels != config.data.channels:
        raise ValueError(
            f"data.channels is {config.data.channels}, but model.in_channels is"
            f" {config.model.in_channels}"
        )
    if config.data.size % config.model.downsample:
        raise ValueError(
            f"data.size {config.data.size} is not a multiple of the first stage's downsampling"
            f" {config.model.downsample}"
        )
    stream.made[0]  # images that do not fit


def train(config: schema.AutoencoderTrainConfig, workdir: epath.PathLike) -> int:
    """Trains until `config.steps` in `workdir`, going on where it stopped; returns an exit code."""
    mesh = sharding.make_mesh(config.mesh)
    batch_sharding = sharding.batch_sharding(mesh)
    root = jax.random.key(config.seed)
    stream = data.stream(config.data, batch_size=config.batch_size, seed=config.seed)
    held_out = data.stream(
        config.data, batch_size=config.batch_size, seed=config.seed, split="eval"
    )
    check(config, stream, mesh)
    shapes, shardings = abstract_state(config, mesh)
    # only now is anything written: a wrong config leaves no run behind that refuses the right one
    run, changes = rundir.open_run(workdir, config)
    for change in changes:
        cli.say(f"changed on resume: {change}")

    manager = checkpoint.manager(run, config.max_to_keep)
    saved = checkpoint.latest_step(manager)
    if saved is None:
        state, _ = init_state(config, jax.random.fold_in(root, INIT), mesh)
    else:
        state = checkpoint.restore(manager, sharding.with_shardings(shapes, shardings))
        rundir.drop_metrics_after(run, int(state.step))
    first = int(state.step)
    counts = ", ".join(f"{n} {count_parameters(p) / 1e6:.2f} M" for n, p in state.params.items())
    cli.say(f"parameters: {counts}; {stream.num_records} images; mesh {dict(mesh.shape)}")
    if first >= config.steps:
        cli.say(f"{run}: already at step {first} of {config.steps}; raise --steps to go on")
        return 0

    evaluate_batch = make_eval_step(config, mesh)
    draw = make_preview(config, mesh, held_out)
    train_step = compile_step(
        make_train_step(config, mesh), state, data.global_batch(stream, first, batch_sharding), root
    )
    every, monitor = config.intervals, Monitor(run, first, config.steps, config.batch_size)
    due = lambda interval, step: interval and step % interval == 0  # noqa: E731

    def averaged(state: GanState) -> dict:
        return {**state.params, **state.ema_params}

    def evaluate(state: GanState) -> dict[str, float]:
        batches = [
            data.global_batch(held_out, i, batch_sharding) for i in range(config.eval_batches)
        ]
        weights = {"": state.params} | ({"_ema": averaged(state)} if state.ema_params else {})
        values = {}
        for suffix, params in weights.items():
            found = [jax.device_get(evaluate_batch(params, batch)) for batch in batches]
            values |= {f"eval/{n}{suffix}": float(np.mean([f[n] for f in found])) for n in found[0]}
        return values

    section = serialize.to_dict(config.model)
    code = 0
    with (
        manager,  # on the way out, an error's too, the checkpoint under way is finished
        stop.on_signal() as stopping,
        data.prefetch(stream, first, batch_sharding) as batches,
    ):
        for i, batch in batches:
            state, metrics = train_step(state, batch, root)
            step, last = i + 1, i + 1 == config.steps
            monitor.step(step, metrics, stream.bad_records, log=bool(due(every.log, step)) or last)
            stop.refuse_bad(monitor, config.max_bad_steps, run, saved)
            if due(every.evaluate, step) or (last and every.evaluate):
                monitor.write(step, evaluate(state), aloud=True)
            if due(every.sample, step) or (last and every.sample):
                draw(averaged(state), rundir.sample_path(run, step))
                monitor.pause()
            interrupted = stopping(step)
            if due(every.save, step) or last or interrupted:
                checkpoint.save(manager, state, rundir.meta(config, mesh))
                saved = step
                monitor.flush()
            if due(every.snapshot, step) or last:
                checkpoint.save_snapshot(run, step, averaged(state), section)
            if last or interrupted:
                break
        if not last:
            monitor.say(f"stopped at step {step}; run the same command again to go on")
            code = cli.INTERRUPTED
    monitor.flush()
    stop.refuse_bad(monitor, config.max_bad_steps, run, saved)
    monitor.close()
    return code
