"""The surroundings of a training loop: its clock, bar, watch, trace, signals and checkpoints.

loop = Loop(config, run, mesh, stream, manager, state, started=time.time())
train_step = loop.compile(step, state, root, plain_step)
with loop:
    for i, batch in loop.batches:
        with loop.traced(i):
            state, metrics = train_step(state, batch, root)
        loop.made(i + 1, state, metrics)
        stop = loop.stops(i + 1)
        loop.save(i + 1, state, model_config, final=stop)
        if stop:
            break
return loop.exit_code
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ldm_jax import data, finite, schema, sharding
from ldm_jax.runtime import checkpoint, cli, processes, reading, rundir
from ldm_jax.runtime.checkpoint_manager import Manager
from ldm_jax.runtime.log import LOG
from ldm_jax.train.run import goodput, profiling, stop, writers
from ldm_jax.train.run.monitor import Monitor, compile_step
from ldm_jax.train.run.watchdog import Watch


def plain(config: schema.BaseTrainConfig) -> schema.BaseTrainConfig:
    """The config without remat and kernels, whose step has each operation of the model once."""
    return dataclasses.replace(config, remat=False, attention="xla")


def averaged(state: Any) -> dict:
    """The parameters, the moving average where a part has one."""
    return {**state.params, **state.ema_params}


def ended(config: schema.BaseTrainConfig, run: epath.Path, state: Any) -> bool:
    """True, with a log line, if `config.steps` are made already."""
    if (step := int(state.step)) < config.steps:
        return False
    LOG.info(f"{run}: already at step {step} of {config.steps}; raise --steps to go on")
    return True


def is_due(interval: int, step: int) -> bool:
    """True if `step` is a multiple of `interval`; never for 0."""
    return bool(interval) and step % interval == 0


class Loop:
    """Everything around the steps of one start of a run; a context from the first to the last."""

    def __init__(
        self,
        config: schema.BaseTrainConfig,
        run: epath.Path,
        mesh: Mesh,
        stream: data.Stream,
        manager: Manager,
        state: Any,
        *,
        started: float,
        watch: Watch | None = None,
    ) -> None:
        """`state`: that of the first step, new or from the last checkpoint of `manager`.

        manager: closed at the end, when the checkpoint under way is finished.
        started: `time.time()` when this start began.
        watch: notified of every step.
        """
        self.config, self.run, self.mesh = config, run, mesh
        self.stream, self.manager, self.first = stream, manager, int(state.step)
        self.watch = watch or Watch()
        self.clock = goodput.Clock(started, _spent(manager, self.first))
        steps = profiling.window(config.profile, config.steps)
        self.profile = profiling.Profile(run, steps, self.first)
        self.monitor = Monitor(
            *(run, self.first, config.steps, config.batch_size, self.clock),
            lambda: writers.beside_metrics(run, config),
        )
        self.monitor.skipped_steps = int(state.skips["count"])
        self.batches: Iterator[tuple[int, dict]] = iter(())
        self._unsaved: tuple[int, Any] | None = None
        self._data_error: Exception | None = None
        self._failed_at = -1  # the batch that this process could not make
        self._ended: tuple[int, Exception] | None = None
        """Steps made before the data of a process ended this run, and the error for it."""
        self.exit_code = cli.INTERRUPTED

    def compile(self, step: Any, state: Any, root: jax.Array, model_step: Callable) -> Callable:
        """Compile `step` ahead of the first batch. model_step() makes that of the `plain` config.

        Its operations are the model's, which the monitor compares with the device's peak.
        """
        with self.watch.doing("compiling"), self.monitor.bar.doing("compiling"):
            batch = data.global_batch(self.stream, self.first, sharding.batch_sharding(self.mesh))
            compiled, self.monitor.work = compile_step(
                step, state, batch, root, model_step=model_step
            )
        self.monitor.pause()
        return compiled

    def __enter__(self) -> "Loop":
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.manager)  # also after an error, the save under way is finished
            self._stopping = stack.enter_context(stop.on_signal())
            place = sharding.batch_sharding(self.mesh)
            batches = stack.enter_context(data.prefetch(self.stream, self.first, place))
            stack.enter_context(contextlib.closing(self.profile))
            self._stack = stack.pop_all()
        self.clock.begin()
        self.batches = self.clock.batches(self.watch.batches(self._watched(batches)))
        return self

    def _watched(self, batches: Iterator[tuple[int, dict]]) -> Iterator[tuple[int, dict]]:
        """The batches; an error of the data is known as such in `__exit__`.

        With several processes the others may have begun this step, and wait for this one: it takes
        part with batches of NaN, whose steps change nothing, until all have stopped.
        """
        i = self.first - 1
        try:
            for i, batch in batches:
                yield i, batch
        except Exception as error:
            self._data_error = error
            if jax.process_count() == 1:
                raise
        LOG.warning(f"no batch {i + 1}, the run stops: {self._data_error}")
        self._failed_at = i + 1
        stop.request()
        nothing = data.batch_of_nan(self.stream, sharding.batch_sharding(self.mesh))
        while True:
            i += 1
            yield i, nothing

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        data_end = error is self._data_error or isinstance(error, data.BadDataError)
        if error is not None and data_end:
            self._save_before_the_end()
        self._stack.__exit__(kind, error, traceback)
        if kind is not None:
            self.monitor.abandon()
            return
        self.monitor.flush()
        if self._ended is None:
            stop.refuse_bad(self.monitor, self.config, self.manager)
        self.monitor.close()
        if self._ended is not None:
            raise self._ended[1]

    def _agree_on_the_data(self, state: Any) -> None:
        """Learn whether the data of any process have ended this run; all call this at one step.

        A step on a batch of NaN is skipped by all, so that none was if the last one was not.
        """
        if jax.process_count() == 1 or self._ended or not int(state.bad_steps):
            return
        failed_n, permanent_n = processes.gathered(
            (self._failed_at, isinstance(self._data_error, ValueError))
        ).T
        if (failed_n < 0).all():
            return
        step = int(failed_n[failed_n >= 0].min())
        process = int(np.argmax(failed_n == step))
        kind = data.BadDataError if permanent_n[process] else RuntimeError
        other = kind(f"process {process} could not make batch {step}, see its log")
        self._ended = step, self._data_error or other

    def traced(self, i: int) -> contextlib.AbstractContextManager:
        """Context of the step after `i` others: traced if it is in the window of --profile."""
        return self.profile.traced(i)

    def made(self, step: int, state: Any, metrics: dict) -> None:
        """After step number `step`; `metrics` are still on the device.

        FloatingPointError after too many steps in a row that were skipped.
        """
        self.clock.made = metrics["loss"]
        self._unsaved = step, state
        self.watch.step(step)
        self.manager.check_writes()
        log = is_due(self.config.intervals.log, step) or step == self.config.steps
        self.monitor.step(step, metrics, self.stream.bad_records, log=log)
        if self.monitor.bad_steps > self.config.max_bad_steps:
            self._agree_on_the_data(state)
        if self._ended is None:
            stop.refuse_bad(self.monitor, self.config, self.manager)
        if self.profile.ends(step):
            with self.paused("tracing", state):
                self.profile.close()

    def due(self, what: str, step: int) -> bool:
        """True if `what` of `config.intervals` is due; also at the last step, unless it is 0."""
        interval = getattr(self.config.intervals, what)
        return is_due(interval, step) or (step == self.config.steps and bool(interval))

    @contextlib.contextmanager
    def paused(self, what: str, state: Any) -> Iterator[None]:
        """Begin when the devices have made `state`; the time inside does not count as steps."""
        # the device may be steps behind: its training must not count as time of `what`
        jax.block_until_ready(state.step)
        self.monitor.catch_up()
        with self.watch.doing(what), self.clock.paused(), self.monitor.bar.doing(what):
            yield
        self.monitor.pause()

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Write the metrics of an evaluation, also to the terminal."""
        self.monitor.write(step, values, aloud=True)

    def drawn(self, step: int) -> None:
        """Show the pictures of `step`, which are in the run, in TensorBoard too."""
        self.monitor.picture(step, rundir.sample_path(self.run, step))

    def stops(self, step: int) -> bool:
        """True if the loop ends with this step: the last one, or a signal. Call once a step."""
        # first, at every step and in every process: with several it is a collective agreement
        interrupted = self._stopping(step)
        last = step == self.config.steps
        if self._unsaved is not None and (interrupted or last or self._saves(step)):
            self._agree_on_the_data(self._unsaved[1])
        if self._ended is not None:
            LOG.info(f"the data end this run; step {self._ended[0]} is saved first")
        elif last:
            self.exit_code = 0
        elif interrupted:
            LOG.info(f"stopped at step {step} of {self.config.steps}")
        return self._ended is not None or last or interrupted

    def _saves(self, step: int) -> bool:
        every = self.config.intervals
        return any(is_due(n, step) for n in (every.save, every.snapshot)) or self.manager.retry_due

    def save(self, step: int, state: Any, model_config: Mapping[str, Any], *, final: bool) -> None:
        """Save a checkpoint and a snapshot where they are due; `final`: a checkpoint that may not
        fail. `model_config` is the config of the model, as JSON values, which a snapshot holds."""
        every = self.config.intervals
        if self._ended is not None:
            state = _without_last_steps(state, step - self._ended[0])
            step = self._ended[0]
        if is_due(every.save, step) or self.manager.retry_due or final:
            self._unsaved = None
            with self.paused("saving", state):
                self._save_checkpoint(step, state, final)
                if self._ended is None:
                    self.stream.agree()  # a collective: here, where all processes meet anyway
                self.monitor.flush()
        if self._ended is not None:
            rundir.drop_metrics_after(self.run, step)
        if is_due(every.snapshot, step) or step == self.config.steps:
            with self.paused("saving", state):
                checkpoint.save_snapshot(self.run, step, averaged(state), model_config)

    def _save_checkpoint(self, step: int, state: Any, final: bool) -> None:
        meta = rundir.meta(self.config, self.mesh)
        meta["clock"] = self.clock.spent(orderly=final)
        if checkpoint.save(self.manager, state, meta, final=final):
            self.watch.saved(step)

    def _save_before_the_end(self) -> None:
        """Save the steps made since the last checkpoint, when the data end the run.

        With several processes all come here: those of training end through `_agree_on_the_data`,
        held-out ones through `data.read`, which raises in all.
        """
        if self._unsaved is None:
            return
        step, state = self._unsaved
        LOG.info(f"the data end this run; step {step} is saved first")
        try:
            with self.paused("saving", state):
                self._save_checkpoint(step, state, final=True)
                self.monitor.flush()
        except Exception as error:  # of the save: that of the data is raised, which came first
            LOG.warning(f"step {step} was not saved: {error}")


def _without_last_steps(state: Any, count: int) -> Any:
    """The state before its last `count` steps, all of which were skipped."""
    skips = {**state.skips, "count": state.skips["count"] - count}
    return state.replace(step=state.step - count, bad_steps=state.bad_steps - count, skips=skips)


def _spent(manager: Manager, first: int) -> dict[str, Any] | None:
    """Times in checkpoint `first`; None without one, or in one of an older version."""
    folder = epath.Path(manager.directory) / str(first)
    spent = checkpoint.read_meta(folder).get("clock") if folder.exists() else None
    if spent is not None:
        with reading.refusals(folder, "give another step, or bring back a copy"):
            for name in ("trained_s", "wall_s", "time"):
                finite.checked(spent[name], f"its clock: {name}", least=0)
            _ = spent["orderly"]
    return spent
