"""Trains an adapter, or DreamBooth: `ldm-train finetune:lora --init-from PATH --workdir DIR`."""

import functools
import time

import jax
from etils import epath

from ldm_jax import bundle, conditioning, data, schema, sharding
from ldm_jax.adapters import runs
from ldm_jax.runtime import checkpoint, rundir
from ldm_jax.schema import serialize
from ldm_jax.train import frozen, ldm
from ldm_jax.train.finetune import adapter, base, dreambooth, inversion
from ldm_jax.train.finetune.loss import make_loss, make_train_step
from ldm_jax.train.ldm import initial, preview
from ldm_jax.train.ldm.loop import EVALUATE, INIT, SAMPLE, make_evaluate
from ldm_jax.train.run import dataset, startup
from ldm_jax.train.run.loop import Loop, averaged, ended, plain
from ldm_jax.train.run.watchdog import Watch


def train(
    config: schema.AdapterTrainConfig, workdir: epath.PathLike, watch: Watch | None = None
) -> int:
    """Trains until `config.steps` in `workdir`, going on where it stopped; returns an exit code."""
    started, root = time.time(), rundir.root_key(workdir, config)
    config = adapter.settled(config)
    adapter.check(config)
    dreambooth.check(config)
    mesh = sharding.make_mesh(config.mesh)
    host = base.find(config, workdir)
    given = frozen.find(config, workdir)
    tokenizer, vectors = inversion.find(config, given)
    captions = inversion.texts(config) or dreambooth.texts(config)
    open_stream = functools.partial(
        data.stream,
        config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        tokenizer=tokenizer,
        cached=config.cache.path,
        num_ids=conditioning.map_ids(config.cond),
        captions=captions,
    )
    stream, held_out = open_stream(), open_stream(split="eval")
    labels = "label" in conditioning.needs(config.cond)
    known = dataset.check(workdir, stream, held_out, labels=labels)
    ldm.check(config, given.first_stage, stream, mesh)
    run = startup.open_run(workdir, config)  # only now is anything written
    fixed = frozen.prepare(config, run, mesh, stream, given)
    fixed = base.prepare(config, host, run, fixed, mesh)
    stream = dreambooth.with_class_images(config, run, stream, given.tokenizer, mesh)

    manager = checkpoint.manager(run, config.max_to_keep, config.max_failed_saves)
    state = startup.resume(run, manager, *adapter.abstract_state(config, mesh))
    dataset.keep(run, known, resumed=state is not None)
    if state is None:
        state, shardings = adapter.init_state(config, jax.random.fold_in(root, INIT), mesh)
        if not runs.trains_adapter(config):
            state = initial.begin(config, run, state, shardings, mesh)
        state = inversion.begin(state, shardings, vectors)
    startup.report(config, mesh, state, stream)
    if ended(config, run, state):
        return 0

    model_config = serialize.to_dict(bundle.model_config(config, fixed.config))
    wide = inversion.widened(config)
    loss, whole = make_loss(wide, fixed, mesh), adapter.make_whole(config)
    key = jax.random.fold_in(root, EVALUATE)
    evaluate = make_evaluate(wide, fixed, mesh, held_out, key, loss)
    key = jax.random.fold_in(root, SAMPLE)
    draw = preview.make(wide, fixed, mesh, held_out, key, tokenizer=tokenizer, whole=whole)
    loop = Loop(config, run, mesh, stream, manager, state, started=started, watch=watch)
    train_step = loop.compile(
        make_train_step(wide, fixed, mesh),
        state,
        root,
        lambda: make_train_step(plain(wide), fixed, mesh),
    )
    with loop:
        for i, batch in loop.batches:
            with loop.traced(i):
                state, metrics = train_step(state, batch, root)
            step = i + 1
            loop.made(step, state, metrics)
            if loop.due("evaluate", step):
                with loop.paused("evaluating", state):
                    loop.evaluated(step, evaluate(state))
            if loop.due("sample", step):
                with loop.paused("drawing", state):
                    draw(averaged(state), rundir.sample_path(run, step))
                    loop.drawn(step)
            stop = loop.stops(step)
            loop.save(step, state, model_config, final=stop)
            if stop:
                break
    if loop.exit_code == 0:
        adapter.write_file(config, run)
    return loop.exit_code
