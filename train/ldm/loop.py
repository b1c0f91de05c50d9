"""Trains a latent diffusion model on a frozen first stage: `ldm-train CONFIG --workdir DIR`."""

import functools
import time
from collections.abc import Callable

import jax
from etils import epath
from jax.sharding import Mesh

from ldm_jax import bundle, conditioning, data, schema, sharding
from ldm_jax.runtime import checkpoint, rundir
from ldm_jax.schema import serialize
from ldm_jax.train import frozen
from ldm_jax.train.ldm import initial, preview
from ldm_jax.train.ldm.loss import abstract_state, init_state, make_eval_step, make_train_step
from ldm_jax.train.prepare import shards
from ldm_jax.train.run import dataset, startup
from ldm_jax.train.run.loop import Loop, averaged, ended, plain
from ldm_jax.train.run.watchdog import Watch
from ldm_jax.train.step import Loss
from ldm_jax.train_state import TrainState

INIT, _, EVALUATE, SAMPLE = range(4)  # folded into the root key; `step.TRAIN` is 1


def train(
    config: schema.LatentDiffusionTrainConfig, workdir: epath.PathLike, watch: Watch | None = None
) -> int:
    """Trains until `config.steps` in `workdir`, going on where it stopped; returns an exit code."""
    started, root = time.time(), rundir.root_key(workdir, config)
    mesh = sharding.make_mesh(config.mesh)
    given = frozen.find(config, workdir)
    open_stream = functools.partial(
        data.stream,
        config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        tokenizer=given.tokenizer,
        cached=config.cache.path,
        num_ids=conditioning.map_ids(config.cond),
    )
    stream, held_out = open_stream(), open_stream(split="eval")
    labels = "label" in conditioning.needs(config.cond)
    known = dataset.check(workdir, stream, held_out, labels=labels)
    check(config, given.first_stage, stream, mesh)
    run = startup.open_run(workdir, config)  # only now is anything written
    fixed = frozen.prepare(config, run, mesh, stream, given)

    manager = checkpoint.manager(run, config.max_to_keep, config.max_failed_saves)
    state = startup.resume(run, manager, *abstract_state(config, mesh))
    dataset.keep(run, known, resumed=state is not None)
    if state is None:
        fresh, shardings = init_state(config, jax.random.fold_in(root, INIT), mesh)
        state = initial.begin(config, run, fresh, shardings, mesh)
    startup.report(config, mesh, state, stream)
    if ended(config, run, state):
        return 0

    evaluate = make_evaluate(config, fixed, mesh, held_out, jax.random.fold_in(root, EVALUATE))
    key = jax.random.fold_in(root, SAMPLE)
    draw = preview.make(config, fixed, mesh, held_out, key, tokenizer=given.tokenizer)
    model_config = serialize.to_dict(bundle.model_config(config, fixed.config))
    loop = Loop(config, run, mesh, stream, manager, state, started=started, watch=watch)
    train_step = loop.compile(
        make_train_step(config, fixed, mesh),
        state,
        root,
        lambda: make_train_step(plain(config), fixed, mesh),
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
    return loop.exit_code


def make_evaluate(
    config: schema.LatentDiffusionTrainConfig,
    fixed: frozen.Frozen,
    mesh: Mesh,
    held_out: data.Stream,
    key: jax.Array,
    loss: Loss | None = None,
) -> Callable[[TrainState], dict[str, float]]:
    """evaluate(state) -> {"eval/loss", "eval/loss_ema"}, means over `config.eval_batches`.

    loss: default: that of `make_loss`.
    """
    eval_step = make_eval_step(config, fixed, mesh, loss)

    def evaluate(state: TrainState) -> dict[str, float]:
        sums = {"eval/loss": 0.0, "eval/loss_ema": 0.0}
        for i in range(config.eval_batches):
            batch = data.global_batch(held_out, i, sharding.batch_sharding(mesh))
            of_batch = functools.partial(eval_step, batch=batch, key=jax.random.fold_in(key, i))
            sums["eval/loss"] += float(of_batch(state.params))
            sums["eval/loss_ema"] += float(of_batch(averaged(state)))
        return {name: value / config.eval_batches for name, value in sums.items()}

    return evaluate


def check(
    config: schema.LatentDiffusionTrainConfig,
    model: schema.FirstStageModelConfig,
    stream: data.Stream,
    mesh: Mesh,
) -> None:
    """ValueError if config, first stage, data and mesh do not fit each other.

    Warns of a latent cache whose pictures have changed.
    """
    startup.check(config, mesh)
    if config.cache.path:
        shards.warn_of_changes(config.cache.path, config.data)
    bundle.check(bundle.model_config(config, model), config.data.channels)
    if model.in_channels != config.data.channels:
        raise ValueError(
            f"data.channels is {config.data.channels}, but the first stage takes"
            f" {model.in_channels}"
        )
    name = conditioning.name_of(config.cond)
    for needed in conditioning.needs(config.cond):
        if needed == "image" and needed not in stream.spec:
            raise ValueError(
                f"the condition is a {name}, which is made from the image: train without"
                f" --cache.path {config.cache.path}"
            )
        if needed not in stream.spec:
            raise ValueError(
                f"the condition is a {name}, but the data have no {needed}:"
                f" they have {', '.join(stream.spec)}"
            )
    if stream.source.num_classes is not None:
        kind = conditioning.kind_of(config.cond)
        kind.check_classes(config.cond, stream.source.num_classes)
    stream.made[0]  # decodes one example, to refuse images that do not fit
