"""The loop of every recipe: step, log, evaluate, draw, save, until the last step or a signal."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from ldm_jax import checkpoint, cli, data, rundir, schema, sharding
from ldm_jax.train import stop
from ldm_jax.train.monitor import Monitor, compile_step
from ldm_jax.train.watchdog import Watch


@dataclasses.dataclass(frozen=True)
class Job:
    """What a recipe hands to the loop."""

    config: schema.TrainConfig
    run: epath.Path
    mesh: Mesh
    root: jax.Array
    """The run's root key."""
    stream: data.Stream
    manager: ocp.CheckpointManager
    """Closed at the end, when the checkpoint under way is finished."""
    train_step: Callable
    """step(state, batch, root) -> (state, metrics): a partial of a jitted function."""
    evaluate: Callable[[Any], dict[str, float]]
    """evaluate(state) -> {"eval/NAME": value} over held-out images."""
    draw: Callable[[dict, epath.Path], None]
    """draw(params, path) writes a picture."""
    section: Mapping[str, Any]
    """Of the config what sampling needs, as JSON values: goes into snapshots."""
    watch: Watch
    """Told where the loop stands."""


def averaged(state: Any) -> dict:
    """The parameters, the moving average where a part has one."""
    return {**state.params, **state.ema_params}


def run(job: Job, state: Any, saved: int | None) -> int:
    """Trains from `state`, whose last checkpoint is `saved`, to the end; returns an exit code."""
    config, first = job.config, int(state.step)
    rows = sharding.batch_sharding(job.mesh)
    with job.watch.doing("compiling"):
        train_step = compile_step(
            job.train_step, state, data.global_batch(job.stream, first, rows), job.root
        )
    monitor = Monitor(job.run, first, config.steps, config.batch_size)
    with (
        job.manager,  # on the way out, an error's too, the checkpoint under way is finished
        stop.on_signal() as stopping,
        data.prefetch(job.stream, first, rows) as batches,
    ):
        for i, batch in job.watch.batches(batches):
            state, metrics = train_step(state, batch, job.root)
            step, last = i + 1, i + 1 == config.steps
            job.watch.step(step)
            log = due(config.intervals.log, step) or last
            monitor.step(step, metrics, job.stream.bad_records, log=log)
            stop.refuse_bad(monitor, config.max_bad_steps, job.run, saved)
            with job.watch.doing("evaluating"):
                look(job, monitor, state, step, last)
            interrupted = stopping(step)
            with job.watch.doing("saving"):
                if keep(job, state, step, last, interrupted):
                    saved = step
                    job.watch.saved(step)
                    monitor.flush()
            if last or interrupted:
                break
        if not last:
            monitor.say(f"stopped at step {step}; run the same command again to go on")
    monitor.flush()
    stop.refuse_bad(monitor, config.max_bad_steps, job.run, saved)
    monitor.close()
    return 0 if last else cli.INTERRUPTED


def due(interval: int, step: int) -> bool:
    """Whether `step` is one of every `interval`; 0 is never."""
    return bool(interval) and step % interval == 0


def look(job: Job, monitor: Monitor, state: Any, step: int, last: bool) -> None:
    """Evaluates and draws where an interval asks for it, and at the last step."""
    every = job.config.intervals
    if due(every.evaluate, step) or (last and every.evaluate):
        monitor.write(step, job.evaluate(state), aloud=True)
    if due(every.sample, step) or (last and every.sample):
        job.draw(averaged(state), rundir.sample_path(job.run, step))
        monitor.pause()


def keep(job: Job, state: Any, step: int, last: bool, interrupted: bool) -> bool:
    """Saves checkpoint and snapshot where they are due; whether there is a new checkpoint."""
    every = job.config.intervals
    saves = due(every.save, step) or last or interrupted
    if saves:
        checkpoint.save(job.manager, state, rundir.meta(job.config, job.mesh))
    if due(every.snapshot, step) or last:
        checkpoint.save_snapshot(job.run, step, averaged(state), job.section)
    return saves
