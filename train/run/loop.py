"""The loop of every recipe: step, log, evaluate, draw, save, until the last step or a signal."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from ldm_jax import data, schema, sharding
from ldm_jax.runtime import checkpoint, cli, rundir
from ldm_jax.runtime.checkpoint_manager import Manager
from ldm_jax.runtime.log import LOG
from ldm_jax.train.run import goodput, profiling, stop
from ldm_jax.train.run.monitor import Monitor, compile_step
from ldm_jax.train.run.watchdog import Watch


@dataclasses.dataclass(frozen=True)
class Job:
    """What a recipe hands to the loop."""

    config: schema.TrainConfig
    run: epath.Path
    mesh: Mesh
    root: jax.Array
    """The run's root key."""
    stream: data.Stream
    manager: Manager
    """Closed at the end, when the checkpoint under way is finished."""
    train_step: Callable
    """step(state, batch, root) -> (state, metrics): a partial of a jitted function."""
    evaluate: Callable[[Any], dict[str, float]]
    """evaluate(state) -> {"eval/NAME": value} over held-out images."""
    draw: Callable[[dict, epath.Path], None]
    """draw(params, path) writes a picture."""
    model_step: Callable[[], Callable]
    """Makes the `train_step` of the `plain` config, whose operations are the model's."""
    started: float
    """`time.time()` when this start began."""
    section: Mapping[str, Any]
    """Of the config what sampling needs, as JSON values: goes into snapshots."""
    watch: Watch
    """Told where the loop stands."""


def plain(config: schema.TrainConfig) -> schema.TrainConfig:
    """The config without remat and kernels: its step counts no operation twice and all of them."""
    return dataclasses.replace(config, remat=False, attention="xla")


def averaged(state: Any) -> dict:
    """The parameters, the moving average where a part has one."""
    return {**state.params, **state.ema_params}


def ended(config: schema.TrainConfig, run: epath.Path, state: Any) -> bool:
    """Whether `config.steps` are made already; says so."""
    if (step := int(state.step)) < config.steps:
        return False
    LOG.info(f"{run}: already at step {step} of {config.steps}; raise --steps to go on")
    return True


def run(job: Job, state: Any, saved: int | None) -> int:
    """Trains from `state`, whose last checkpoint is `saved`, to the end; returns an exit code."""
    config, first = job.config, int(state.step)
    rows = sharding.batch_sharding(job.mesh)
    clock = goodput.Clock(job.started, _spent(job, saved))
    profile = profiling.Profile(job.run, profiling.window(config.profile, config.steps), first)
    with job.watch.doing("compiling"):
        batch = data.global_batch(job.stream, first, rows)
        train_step, work = compile_step(
            job.train_step, state, batch, job.root, model_step=job.model_step
        )
    monitor = Monitor(job.run, first, config.steps, config.batch_size, clock, work)
    monitor.skipped_steps = int(state.skips["count"])
    with (
        job.manager,  # on the way out, an error's too, the checkpoint under way is finished
        stop.on_signal() as stopping,
        data.prefetch(job.stream, first, rows) as batches,
        contextlib.closing(profile),
    ):
        clock.begin()
        for i, batch in clock.batches(job.watch.batches(batches)):
            with profile.around(i):
                state, metrics = train_step(state, batch, job.root)
            clock.made = metrics["loss"]
            step, last = i + 1, i + 1 == config.steps
            job.watch.step(step)
            job.manager.look()
            log = due(config.intervals.log, step) or last
            monitor.step(step, metrics, job.stream.bad_records, log=log)
            stop.refuse_bad(monitor, config, job.manager)
            if profile.ends(step):
                with aside(job, monitor, "tracing", state):
                    profile.close()
            look(job, monitor, state, step, last)
            interrupted = stopping(step)
            if keep(job, monitor, state, step, last, interrupted):
                job.watch.saved(step)
            if last or interrupted:
                break
        if not last:
            LOG.info(f"stopped at step {step}; run the same command again to go on")
    monitor.flush()
    stop.refuse_bad(monitor, config, job.manager)
    monitor.close()
    return 0 if last else cli.INTERRUPTED


def due(interval: int, step: int) -> bool:
    """Whether `step` is one of every `interval`; 0 is never."""
    return bool(interval) and step % interval == 0


@contextlib.contextmanager
def aside(job: Job, monitor: Monitor, what: str, state: Any) -> Iterator[None]:
    """Inside is no training: it begins when the devices have made `state`, and counts apart."""
    jax.block_until_ready(state.step)
    monitor.catch_up()
    with job.watch.doing(what), monitor.clock.aside():
        yield
    monitor.pause()


def look(job: Job, monitor: Monitor, state: Any, step: int, last: bool) -> None:
    """Evaluates and draws where an interval asks for it, and at the last step."""
    every = job.config.intervals
    if due(every.evaluate, step) or (last and every.evaluate):
        with aside(job, monitor, "evaluating", state):
            monitor.write(step, job.evaluate(state), aloud=True)
    if due(every.sample, step) or (last and every.sample):
        with aside(job, monitor, "drawing", state):
            job.draw(averaged(state), rundir.sample_path(job.run, step))


def keep(job: Job, monitor: Monitor, state: Any, step: int, last: bool, interrupted: bool) -> bool:
    """Saves checkpoint and snapshot where they are due; whether there is a new checkpoint."""
    every = job.config.intervals
    final = last or interrupted
    saves = due(every.save, step) or job.manager.again or final
    if saves:
        with aside(job, monitor, "saving", state):
            spent = {"clock": monitor.clock.spent(orderly=final)}
            meta = rundir.meta(job.config, job.mesh) | spent
            saves = checkpoint.save(job.manager, state, meta, final=final)
            job.stream.agree()
            monitor.flush()
    if due(every.snapshot, step) or last:
        with aside(job, monitor, "saving", state):
            checkpoint.save_snapshot(job.run, step, averaged(state), job.section)
    return saves


def _spent(job: Job, saved: int | None) -> dict[str, Any] | None:
    """What the checkpoint says of the time until then; None in one of an older version."""
    if saved is None:
        return None
    return checkpoint.read_meta(epath.Path(job.manager.directory) / str(saved)).get("clock")
