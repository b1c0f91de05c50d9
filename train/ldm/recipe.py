"""Trains a latent diffusion model on a frozen first stage (`ddpm.py`; section 3.2 of the paper)."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh

from ldm_jax import bundle, conditioning, data, diffusion, latents, schema, sharding, train_state
from ldm_jax.models import attention, convolution, unet
from ldm_jax.runtime import checkpoint, rundir
from ldm_jax.runtime.log import LOG
from ldm_jax.schema import serialize
from ldm_jax.train.frozen import first_stage, text_encoder
from ldm_jax.train.ldm import preview
from ldm_jax.train.run import logs, loop, profiling, startup
from ldm_jax.train.run.watchdog import Watch
from ldm_jax.train_state import TrainState

DRAWS = ("encode", "t", "noise", "offset", "drop_cond", "dropout")  # one key per row for each
NEEDS = {  # of a row, by conditioning
    schema.ClassCondConfig: "label",
    schema.SemanticCondConfig: "segmentation",
    schema.InpaintCondConfig: "mask",
    schema.TextCondConfig: "tokens",
    schema.LayoutCondConfig: "tokens",
    schema.EmbeddingCondConfig: "embedding",
    schema.DepthCondConfig: "depth",
    schema.UpscaleCondConfig: "low_res",
}
NEEDS_IMAGE = (schema.InpaintCondConfig, schema.SuperResCondConfig)
INIT, TRAIN, EVALUATE, SAMPLE = range(4)  # folded into the root key: one stream per purpose


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


def init_state(
    config: schema.LatentDiffusionTrainConfig, key: jax.Array, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """(state, its shardings): born sharded, nothing is ever held whole on one device."""
    tx, _ = train_state.make_optimizer(config.optimizer)
    init = lambda key: train_state.create(init_params(config, key), tx, config.ema)  # noqa: E731
    shardings = sharding.by_rules(jax.eval_shape(init, key), sharding.RULES, mesh)
    return jax.jit(init, out_shardings=shardings)(key), shardings


def make_loss(
    config: schema.LatentDiffusionTrainConfig, frozen: first_stage.Frozen, mesh: Mesh
) -> Callable:
    """loss(frozen_params, params, rows, train) -> (mean loss, metrics) of one microbatch.

    Parameters are whole along fsdp. `rows` is {"batch": {...}, "keys": {draw: [B] keys}}: every
    draw but dropout's depends on its row's key.
    """
    net, cond_stage = modules(config, mesh)
    schedule = diffusion.from_config(config.diffusion)
    cond_trains = text_encoder.trains(config.cond)

    def loss(frozen_params: dict, params: dict, rows: dict, train: bool) -> tuple:
        batch, keys = rows["batch"], rows["keys"]
        encode = functools.partial(
            latents.encode, frozen.module, frozen_params["first_stage"], scale=frozen.scale
        )
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
        cond_params = params.get("cond_stage", {}) if cond_trains else frozen_params["cond_stage"]
        cond = conditioning.from_batch(config.cond, cond_stage, cond_params, batch, encode, dropped)
        x_t = diffusion.q_sample(schedule, x0, t, noise)
        if cond.concat is not None:
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
        per_row, metrics = diffusion.training_loss(
            schedule, config.diffusion, out, x0, noise, t, params.get("logvar")
        )
        return jnp.mean(per_row), {"loss": jnp.mean(per_row), **metrics}

    return loss


def make_train_step(
    config: schema.LatentDiffusionTrainConfig, frozen: first_stage.Frozen, mesh: Mesh
) -> Callable:
    """step(state, batch, key) -> (state, metrics), jitted; donates the state it is given.

    `key` is the run's root key: with `state.step` and the row it determines every draw.
    """
    tx, learning_rate = train_state.make_optimizer(config.optimizer)
    loss = make_loss(config, frozen, mesh)

    def gradients(frozen_params: dict, params: dict, rows: dict) -> tuple:
        return train_state.gradients(
            lambda params, rows: loss(frozen_params, params, rows, True),
            params,
            rows,
            config.accumulate,
        )

    if config.unet.dropout:  # draws one mask for a microbatch: the same on every mesh
        of_all = lambda *given: gradients(*sharding.all_gather(given[:2], mesh), given[2])  # noqa: E731
    else:  # sums of microbatches are float32, and so they travel
        dtype = config.dtype if config.accumulate == 1 else "float32"
        of_all = sharding.data_parallel_gradients(gradients, mesh, dtype)

    def step(frozen_params: dict, state: TrainState, batch: dict, key: jax.Array) -> tuple:
        keys = train_state.step_keys(jax.random.fold_in(key, TRAIN), state.step, DRAWS)
        rows = {
            "batch": batch,
            "keys": {n: train_state.row_keys(k, config.batch_size) for n, k in keys.items()},
        }
        grads, metrics = of_all(frozen_params, state.params, rows)
        norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = state.replace(
            step=state.step + 1,
            params=params,
            ema_params=train_state.update_ema(config.ema, state.ema_params, params, state.step),
            opt_state=opt_state,
        )
        new = train_state.keep_or_skip(config.spikes, metrics["loss"], [norm], new, state)
        metrics |= {
            "grad_norm": norm,
            "learning_rate": learning_rate(state.step),
            "bad_steps": new.bad_steps,
            "skipped_steps": new.skips["count"],
        }
        return new, metrics

    _, shardings = abstract_state(config, mesh)
    jitted = jax.jit(step, donate_argnums=1, out_shardings=(shardings, sharding.replicated(mesh)))
    return functools.partial(jitted, frozen.arguments)


def abstract_state(
    config: schema.LatentDiffusionTrainConfig, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """(shapes, shardings) of the state, without computing anything."""
    tx, _ = train_state.make_optimizer(config.optimizer)
    shapes = jax.eval_shape(
        lambda key: train_state.create(init_params(config, key), tx, config.ema),
        jax.random.key(0),
    )
    return shapes, sharding.by_rules(shapes, sharding.RULES, mesh)


def make_eval_step(
    config: schema.LatentDiffusionTrainConfig, frozen: first_stage.Frozen, mesh: Mesh
) -> Callable:
    """evaluate(params, batch, key) -> held-out loss: a key gives the same t and noise each time."""
    loss = make_loss(config, frozen, mesh)

    def evaluate(frozen_params: dict, params: dict, batch: dict, key: jax.Array) -> jax.Array:
        keys = train_state.step_keys(key, 0, DRAWS)
        keys = {n: train_state.row_keys(k, config.batch_size) for n, k in keys.items()}
        frozen_params, params = sharding.all_gather((frozen_params, params), mesh)
        return loss(frozen_params, params, {"batch": batch, "keys": keys}, False)[0]

    jitted = jax.jit(evaluate, out_shardings=sharding.replicated(mesh))
    return functools.partial(jitted, frozen.arguments)


def check(
    config: schema.LatentDiffusionTrainConfig,
    model: schema.FirstStageModelConfig,
    stream: data.Stream,
    mesh: Mesh,
) -> None:
    """ValueError if config, first stage, data and mesh do not fit each other."""
    if config.steps < 1:
        raise ValueError(f"--steps {config.steps}: give at least 1")
    profiling.window(config.profile, config.steps)
    sharding.check_batch(config.batch_size, mesh, config.accumulate)
    train_state.check_spikes(config.spikes)
    bundle.check(bundle.model_config(config, model), config.data.channels)
    if model.in_channels != config.data.channels:
        raise ValueError(
            f"data.channels is {config.data.channels}, but the first stage takes"
            f" {model.in_channels}"
        )
    hybrid = isinstance(config.cond, schema.HybridCondConfig)
    for cond in (config.cond.text, config.cond.concat) if hybrid else (config.cond,):
        if isinstance(cond, NEEDS_IMAGE) and "image" not in stream.spec:
            raise ValueError(
                f"cond is {type(cond).__name__}, which is made from the image: train without"
                f" --cache.path {config.cache.path}"
            )
        needs = NEEDS.get(type(cond))
        if needs and needs not in stream.spec:
            raise ValueError(
                f"cond is {type(cond).__name__}, but the data have no {needs}:"
                f" they have {', '.join(stream.spec)}"
            )
    if isinstance(config.cond, schema.ClassCondConfig):
        found = stream.source.num_classes
        if found is not None and found > config.cond.num_classes:
            raise ValueError(
                f"the data have {found} classes, but cond.num_classes is {config.cond.num_classes}:"
                f" set it to {found}"
            )
    stream.made[0]  # images that do not fit


def train(
    config: schema.LatentDiffusionTrainConfig, workdir: epath.PathLike, watch: Watch | None = None
) -> int:
    """Trains until `config.steps` in `workdir`, going on where it stopped; returns an exit code."""
    started = time.time()
    mesh = sharding.make_mesh(config.mesh)
    root = jax.random.key(config.seed)
    text = text_encoder.find(config, workdir)
    open_stream = functools.partial(
        data.stream,
        config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        tokenizer=text and text.tokenizer,
        cached=config.cache.path,
    )
    stream, held_out = open_stream(), open_stream(split="eval")
    found = first_stage.find(config, workdir)
    check(config, found[1], stream, mesh)
    shapes, shardings = abstract_state(config, mesh)
    # only now is anything written: a wrong config leaves no run behind that refuses the right one
    run, changes = rundir.open_run(workdir, config)
    logs.begin(run)
    for change in changes:
        LOG.info(f"changed on resume: {change}")
    frozen = dataclasses.replace(
        first_stage.prepare(config, found, run, mesh, stream),
        cond_stage=text_encoder.prepare(config, text, run, mesh),
    )

    manager = checkpoint.manager(run, config.max_to_keep, config.max_failed_saves)
    state = checkpoint.resume(manager, sharding.with_shardings(shapes, shardings))
    saved = None if state is None else int(state.step)
    if state is None:
        state, _ = init_state(config, jax.random.fold_in(root, INIT), mesh)
    else:
        rundir.drop_metrics_after(run, int(state.step))
    startup.report(config, mesh, state, stream)
    if loop.ended(config, run, state):
        return 0

    eval_step = make_eval_step(config, frozen, mesh)
    eval_key = jax.random.fold_in(root, EVALUATE)

    def evaluate(state: TrainState) -> dict[str, float]:
        sums = {"eval/loss": 0.0, "eval/loss_ema": 0.0}
        for i in range(config.eval_batches):
            batch = data.global_batch(held_out, i, sharding.batch_sharding(mesh))
            key = jax.random.fold_in(eval_key, i)
            sums["eval/loss"] += float(eval_step(state.params, batch, key))
            sums["eval/loss_ema"] += float(eval_step(loop.averaged(state), batch, key))
        return {name: value / config.eval_batches for name, value in sums.items()}

    job = loop.Job(
        config=config,
        started=started,
        run=run,
        mesh=mesh,
        root=root,
        stream=stream,
        manager=manager,
        train_step=make_train_step(config, frozen, mesh),
        model_step=lambda: make_train_step(loop.plain(config), frozen, mesh),
        evaluate=evaluate,
        draw=preview.make(config, frozen, mesh, held_out, jax.random.fold_in(root, SAMPLE)),
        section=serialize.to_dict(bundle.model_config(config, frozen.config)),
        watch=watch or Watch(),
    )
    return loop.run(job, state, saved)
