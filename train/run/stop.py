"""Stopping: on a signal (with a checkpoint), or because the loss is no longer finite."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from ldm_jax import schema
from ldm_jax.runtime import checkpoint, interrupts
from ldm_jax.runtime.checkpoint_manager import Manager
from ldm_jax.train.run import early
from ldm_jax.train.run.monitor import Monitor

SAVES = "stopping: finishes this step and saves; Ctrl-C again leaves without saving"
LEAVES = "leaving without saving; once more ends at once"


@contextlib.contextmanager
def on_signal() -> Iterator[Callable[[int], bool]]:
    """Yields stopping(step) -> bool, called once per step by every process.

    With several processes, SIGTERM to one of them reaches all: JAX's preemption notifier agrees on
    a step a little ahead, and each process gets True at that step. SIGINT and SIGHUP (of a terminal
    that closes) are passed on as SIGTERM; a SIGHUP that is ignored (`nohup`) stays so.
    Ctrl-C is answered at once; a second one is a KeyboardInterrupt.
    """
    caught: list[int] = []
    several = jax.process_count() > 1
    early.hand_over()

    def remember(number: int, frame: object) -> None:
        del frame
        caught.append(number)
        if caught.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    def pass_on(number: int, frame: object) -> None:
        remember(number, frame)
        os.kill(os.getpid(), signal.SIGTERM)

    # jax.distributed.initialize has installed its own SIGTERM handler, which must stay
    handlers = (
        {signal.SIGINT: pass_on}
        if several
        else {
            signal.SIGINT: remember,
            signal.SIGTERM: remember,
        }
    )
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        handlers[signal.SIGHUP] = handlers[signal.SIGINT]
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with interrupts.answered(SAVES, LEAVES):
            if several:
                yield multihost_utils.reached_preemption_sync_point
            else:
                yield lambda step: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def request() -> None:
    """Ask all processes to stop, as a SIGTERM to this one does."""
    os.kill(os.getpid(), signal.SIGTERM)


def refuse_bad(monitor: Monitor, config: schema.TrainConfig, manager: Manager) -> None:
    """FloatingPointError if more than `config.max_bad_steps` steps in a row were skipped."""
    limit, factor = config.max_bad_steps, config.spikes.factor
    if monitor.bad_steps <= limit:
        return
    step, bad = monitor.fetched_step, monitor.bad_steps
    monitor.close()  # fetches one more step
    saved, run = checkpoint.latest_step(manager), manager.directory.parent
    good = f"the last good checkpoint is step {saved} in {run}" if saved else "none is saved yet"
    spike = f", or its norm above --spikes.factor {factor:g} times its mean," if factor else ""
    raise FloatingPointError(
        f"loss or gradient not finite{spike} at step {step} and for {bad} steps in a row"
        f" (batches {step - bad} to {step - 1}; limit --max-bad-steps {limit});"
        f" {good}: look at those batches, or lower --optimizer.learning-rate"
    )
