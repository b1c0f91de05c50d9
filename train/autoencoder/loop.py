"""Trains a first stage: `ldm-train CONFIG:first_stage --workdir DIR`."""

import functools
import time

import jax
from etils import epath

from ldm_jax import data, schema, sharding
from ldm_jax.runtime import checkpoint, rundir
from ldm_jax.runtime.log import LOG
from ldm_jax.schema import serialize
from ldm_jax.train.autoencoder import checks, held_out, initial, reconstruction
from ldm_jax.train.autoencoder.loss import (
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
)
from ldm_jax.train.run import dataset, startup
from ldm_jax.train.run.loop import Loop, averaged, ended, plain
from ldm_jax.train.run.watchdog import Watch

INIT = 0  # folded into the root key; `step.TRAIN` is 1


def train(
    config: schema.AutoencoderTrainConfig, workdir: epath.PathLike, watch: Watch | None = None
) -> int:
    """Trains until `config.steps` in `workdir`, going on where it stopped; returns an exit code."""
    started, root = time.time(), rundir.root_key(workdir, config)
    mesh = sharding.make_mesh(config.mesh)
    open_stream = functools.partial(
        data.stream, config.data, batch_size=config.batch_size, seed=config.seed
    )
    stream, eval_stream = open_stream(), open_stream(split="eval")
    checks.first_stage(config, stream, mesh)
    shapes, shardings = abstract_state(config, mesh)
    perceptual = reconstruction.find_perceptual(config, workdir)
    given = initial.find(config, workdir, shapes)
    known = dataset.check(workdir, stream, eval_stream, labels=False)
    run = startup.open_run(workdir, config)  # only now is anything written
    reconstruction.keep_perceptual(config, run, perceptual)
    perceptual = sharding.place(perceptual, sharding.by_rules(perceptual, sharding.RULES, mesh))

    manager = checkpoint.manager(run, config.max_to_keep, config.max_failed_saves)
    state = startup.resume(run, manager, shapes, shardings)
    dataset.keep(run, known, resumed=state is not None)
    if state is None:
        state, _ = init_state(config, jax.random.fold_in(root, INIT), mesh)
        if given is not None:
            state = initial.start(config, state, shardings, given)
            LOG.info(f"starts from {config.init_from or run}; trains {config.train_only}")
    startup.report(config, mesh, state, stream)
    if ended(config, run, state):
        return 0

    evaluate_batch = make_eval_step(config, mesh, perceptual)
    evaluate = held_out.make_evaluate(config, mesh, evaluate_batch, eval_stream)
    draw = held_out.make_preview(config, mesh, eval_stream)
    model_config = serialize.to_dict(config.model)
    loop = Loop(config, run, mesh, stream, manager, state, started=started, watch=watch)
    train_step = loop.compile(
        make_train_step(config, mesh, perceptual),
        state,
        root,
        lambda: make_train_step(plain(config), mesh, perceptual),
    )
    with loop:
        for i, batch in loop.batches:
            with loop.traced(i):
                state, metrics = train_step(state, batch, root)
            step = i + 1
            loop.made(step, state, metrics)
            if loop.due("evaluate", step):
                with loop.paused("evaluating", state):
                    values = evaluate(state.params, "")
                    values |= evaluate(averaged(state), "_ema") if state.ema_params else {}
                    loop.evaluated(step, values)
            if loop.due("sample", step):
                with loop.paused("drawing", state):
                    draw(averaged(state), rundir.sample_path(run, step))
                    loop.drawn(step)
            stop = loop.stops(step)
            loop.save(step, state, model_config, final=stop)
            if stop:
                break
    return loop.exit_code
