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
from etils import epath
from jax.sharding import Mesh

from ldm_jax import data, schema, sharding
from ldm_jax.runtime import checkpoint, cli, rundir
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
        self._data_error: BaseException | None = None
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
        """The batches; an error of the data is known as such in `__exit__`."""
        try:
            yield from batches
        except Exception as error:
            self._data_error = error
            raise

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if error is not None and error is self._data_error:
            self._save_before_the_end()
        self._stack.__exit__(kind, error, traceback)
        if kind is not None:
            self.monitor.abandon()
            return
        self.monitor.flush()
        stop.refuse_bad(self.monitor, self.config, self.manager)
        self.monitor.close()

    def traced(self, i: int) -> contextlib.AbstractContextManager:
        """Context of the step after `i` others: traced if it is in the window of --profile."""
        return self.profile.traced(i)

    def made(self, step: int, state: Any, metrics: dict) -> None:
        """After step number `step`; `metrics` are still on the device.

        FloatingPointError after too many steps in a row that were skipped.
        """
        self.clock.made = metrics["loss"]
        self.watch.step(step)
        self.manager.check_writes()
        log = is_due(self.config.intervals.log, step) or step == self.config.steps
        self.monitor.step(step, metrics, self.stream.bad_records, log=log)
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
        if step == self.config.steps:
            self.exit_code = 0
        elif interrupted:
            LOG.info(f"stopped at step {step} of {self.config.steps}")
        return self.exit_code == 0 or interrupted

    def save(self, step: int, state: Any, model_config: Mapping[str, Any], *, final: bool) -> None:
        """Save a checkpoint and a snapshot where they are due; `final`: a checkpoint that may not
        fail. `model_config` is the config of the model, as JSON values, which a snapshot holds."""
        every = self.config.intervals
        due = is_due(every.save, step) or self.manager.retry_due or final
        self._unsaved = None if due else (step, state)
        if due:
            with self.paused("saving", state):
                self._save_checkpoint(step, state, final)
                self.stream.agree()  # a collective: here, where all processes meet anyway
                self.monitor.flush()
        if is_due(every.snapshot, step) or step == self.config.steps:
            with self.paused("saving", state):
                checkpoint.save_snapshot(self.run, step, averaged(state), model_config)

    def _save_checkpoint(self, step: int, state: Any, final: bool) -> None:
        meta = rundir.meta(self.config, self.mesh)
        meta["clock"] = self.clock.spent(orderly=final)
        if checkpoint.save(self.manager, state, meta, final=final):
            self.watch.saved(step)

    def _save_before_the_end(self) -> None:
        """Save the steps made since the last checkpoint, when the data end a run.

        In one process alone: of several, the others still wait for this one's part of a step.
        """
        if self._unsaved is None or jax.process_count() > 1:
            return
        step, state = self._unsaved
        LOG.info(f"the data end this run; step {step} is saved first")
        try:
            with self.paused("saving", state):
                self._save_checkpoint(step, state, final=True)
                self.monitor.flush()
        except Exception as error:  # of the save: that of the data is raised, which came first
            LOG.warning(f"step {step} was not saved: {error}")


def _spent(manager: Manager, first: int) -> dict[str, Any] | None:
    """Times in checkpoint `first`; None without one, or in one of an older version."""
    folder = epath.Path(manager.directory) / str(first)
    return checkpoint.read_meta(folder).get("clock") if folder.exists() else None
