"""Detect that a process of the run is gone or hangs, name it and the cause, and exit.

    RUN/processes/INDEX.json   sign of life of a process, rewritten every few seconds
    RUN/processes/fault.json   the fault, written by the first process that detects it

A process watches the next one in a ring, its own main thread and fault.json, so that its reads do
not grow with the number of processes. A sign of life is a file that changes: clocks of different
hosts are never compared. In its own file a process sees a newer start of the run, and yields to it.
"""

import contextlib
import errno
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ldm_jax import data, schema
from ldm_jax.runtime import cli, log, reading, storage
from ldm_jax.runtime.log import LOG
from ldm_jax.train.run import logs

LOST = 76  # exit code: a process is gone or hangs; start again
PIPE = "LDM_JAX_SUPERVISOR"  # environment variable with the number of the supervisor's pipe
ENDED = ("done", "stopped", "failed", "lost")  # final states
STEPPING = ("training", "reading a batch")  # states limited by WatchConfig.stall
MISSED = 3  # signs of life that a process may miss after a collective operation has failed
PERMANENT = (  # errors of the system that another start would meet again
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
)

BEAT = {"attempt", "beat", "index", "host", "pid", "step", "doing", "state", "why", "retry"}
FAULT = {"attempt", "by", "why", "retry"}  # names in fault.json; BEAT: in a sign of life

_pipe: int | None = None


class Watch:
    """Signs of life of a process, and its watch over the others.

    The main thread calls `step`, `doing` and `saved`; once started, a thread does the rest. A
    watch that is never started does nothing.
    """

    def __init__(
        self,
        run: epath.PathLike | None = None,
        config: schema.WatchConfig | None = None,
        *,
        index: int = 0,
        count: int = 1,
        attempt: int = 0,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        """Process `index` of `count`; `attempt` is a number that they share and no other start."""
        self.run = None if run is None else epath.Path(run)
        self.config = config or schema.WatchConfig()
        self.index, self.count, self.attempt = index, count, attempt
        self.about = {"index": index, "host": socket.gethostname(), "pid": os.getpid()}
        self.now: dict[str, Any] = {"step": None, "doing": "starting", "saved": None}
        self.state, self.why, self.retry = "running", "", True
        self.beats = self.moves = 0
        self.stepped = self.written = self.broken = self.blind = self.replaced = False
        self.since, self.longest = time.monotonic(), 0.0
        self.seen: dict[int, tuple[Any, float]] = {}
        self.stood: tuple[int, float] = (0, 0.0)
        self.closing, self.leaving = threading.Event(), threading.Event()
        self.thread: threading.Thread | None = None
        self._leave_with = leave

    # --- the main thread ------------------------------------------------------------------------

    def step(self, step: int) -> None:
        """Step number `step` (1 is the first) has been handed to the devices."""
        now = time.monotonic()
        self.longest = max(self.longest, now - self.since) if self.stepped else 0.0
        self.since, self.stepped = now, True
        self.now["step"] = step
        self.moves += 1

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Report that this process is `what` meanwhile: "evaluating", "saving"."""
        before = self.now["doing"]
        self.now["doing"] = what
        self.moves += 1
        try:
            yield
        finally:
            self.now["doing"] = before
            self.since = time.monotonic()  # the time inside does not count for the step
            self.moves += 1

    def batches(self, batches: Iterator) -> Iterator:
        """The same batches; what this process is doing is "reading a batch" or "training"."""
        while True:
            self.now["doing"] = "reading a batch"
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.now["doing"] = "training"
            self.moves += 1
            yield batch

    def saved(self, step: int) -> None:
        """The checkpoint of `step` is being written."""
        self.now["saved"] = step

    # --- start and end --------------------------------------------------------------------------

    def start(self) -> None:
        """Start giving signs of life and watching those of others."""
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def close(self, state: str, why: str = "", retry: bool = True) -> None:
        """Report the end of this process, so that the others do not take it for lost."""
        if self.thread is None:
            return
        self.closing.set()
        self.thread.join(None if self.leaving.is_set() else 10.0)  # storage may hang
        self.state, self.why, self.retry = state, why, retry
        self._show()
        with contextlib.suppress(Exception):  # the end of the run must not fail on this
            self._write()

    def broke(self, error: BaseException) -> None:
        """The main thread ends with `error`: check if another process is the cause.

        If so, this does not return. The coordinator process waits a little at the end: when it
        exits, JAX aborts the others before they can report the cause.
        """
        if self.thread is None:
            tell(state="failed", why=describe(error), retry=worth_retry(error, self.stepped))
            return
        alone = self.count == 1
        if not alone and isinstance(error, Exception) and not isinstance(error, cli.CLEAR):
            self.broken = True
            self.thread.join((MISSED + 3) * self.config.every)
        self.close("failed", describe(error), worth_retry(error, self.stepped))
        if not alone and self.index == 0:
            time.sleep(2 * self.config.every)

    # --- the thread -----------------------------------------------------------------------------

    def _watch(self) -> None:
        last = time.monotonic()
        while True:
            # the time in which the machine was suspended or the process stopped does not count: the
            # others may have given signs that this process could not see
            now = time.monotonic()
            elapsed, last = min(now - last, 2 * self.config.every), now
            try:
                fault = self.check(elapsed)
                if fault is not None and not self.closing.is_set():
                    self._leave(*fault)
            except Exception:  # the watch must not die unnoticed
                sys.stderr.write(f"ldm-train: the watch failed:\n{traceback.format_exc()}")
            if self.closing.wait(self.config.every):
                return

    def check(self, elapsed: float) -> tuple[str, bool] | None:
        """One round: a sign of life, the others' and this main thread's.

        Returns (reason to exit, True if a restart may help), or None. `elapsed`: seconds since the
        last round.
        """
        self.beats += 1
        self._show()
        stands = self._stands(elapsed)
        if self.run is None or not (self.run / "config.json").exists():
            return stands
        try:
            return self._others(elapsed) or stands
        except Exception as error:  # any error of a storage; the run itself fails where it needs it
            if not self.blind:
                self.blind = True
                sys.stderr.write(f"ldm-train: cannot watch the others: {describe(error)}\n")
            return stands

    def _stands(self, elapsed: float) -> tuple[str, bool] | None:
        moves, stood = self.stood
        stood = stood + elapsed if moves == self.moves else 0.0
        self.stood = (self.moves, stood)
        stepping = self.now["doing"] in STEPPING
        limit = self.config.stall if stepping else self.config.pause
        if not limit or stood <= max(limit, 10 * self.longest if stepping else 0.0):
            return None
        faulthandler.dump_traceback(sys.stderr)
        return f"{who(self._beat())} has stood still for {stood:.0f} s", True

    def _others(self, elapsed: float) -> tuple[str, bool] | None:
        successor = read(self.run, f"{self.index}.json")
        if self.written and successor and successor["attempt"] != self.attempt:
            self.replaced = True
            return f"{who(successor)} has taken its place in {self.run}", False
        self._write()
        fault = read(self.run, "fault.json")
        if fault and fault["attempt"] == self.attempt:
            return f"{fault['by']} found: {fault['why']}", fault["retry"]
        others = range(self.count) if self.broken else [(self.index + 1) % self.count]
        faults = [self._judge(other, elapsed) for other in others if other != self.index]
        faults = [one for one in faults if one is not None]
        self.blind = False
        if not faults:
            return None
        return "; ".join(why for why, _ in faults), all(retry for _, retry in faults)

    def _judge(self, other: int, elapsed: float) -> tuple[str, bool] | None:
        """Fault of another process, or None."""
        beat = read(self.run, f"{other}.json")
        if beat is None or beat["attempt"] != self.attempt:
            return None  # still starting, or a new start that will tell us through our own file
        sign, age = self.seen.get(other, (None, 0.0))
        mark = (beat["beat"], beat["state"])
        age = age + elapsed if mark == sign else 0.0
        self.seen[other] = (mark, age)
        if beat["state"] in ("failed", "lost"):
            # an error that hit this process too is reported better by its own main thread, shortly
            return (f"{who(beat)} ended: {beat['why']}", beat["retry"]) if age else None
        limit = MISSED * self.config.every
        limit = min(self.config.timeout, limit) if self.broken else self.config.timeout
        if beat["state"] in ENDED or age <= limit:
            return None
        return f"{who(beat)} is lost: no sign of life for {age:.0f} s", True

    def _leave(self, why: str, retry: bool) -> None:
        self.leaving.set()
        me = f"process {self.index}" if self.count > 1 else "this process"
        message = f"ldm-train: {why}; {me} leaves with code {LOST}"
        LOG.info(message, extra=log.ONLY_FILE)
        # in every process, unlike the log: the first process may be the one that is gone
        sys.stderr.write(f"\n{message}\n")
        sys.stderr.flush()
        logs.flush(2.0)  # storage may hang
        self.state, self.why, self.retry = "lost", why, retry
        self._show()
        with contextlib.suppress(Exception):
            if self.count > 1:
                write_fault(self.run, self.attempt, me, why, retry)
            self._write()
        if self.count > 1 and self.index == 0:
            # when the coordinator exits, JAX aborts the others before they can report the cause
            time.sleep(2 * self.config.every)
        self._leave_with(LOST)

    # --- files ----------------------------------------------------------------------------------

    def _beat(self) -> dict[str, Any]:
        end = {"state": self.state, "why": self.why, "retry": self.retry}
        return {"attempt": self.attempt, "beat": self.beats, **self.about, **self.now, **end}

    def _show(self) -> None:
        limits = {"timeout": self.config.timeout, "every": self.config.every}
        tell(**self._beat(), **limits, run=self.run and str(self.run), count=self.count)

    def _write(self) -> None:
        there = self.written or (self.run / "config.json").exists()
        # a newer start would mistake this file for that of a still newer one
        if there and not self.replaced:
            write(self.run, f"{self.index}.json", self._beat())
            self.written = True


# --- shared with the supervisor -----------------------------------------------------------------


def who(beat: dict[str, Any]) -> str:
    """`process 1 (host b, pid 7, step 12, saving)` of a sign of life."""
    place = f"host {beat['host']}, pid {beat['pid']}"
    at = "before its first step" if beat["step"] is None else f"step {beat['step']}"
    return f"process {beat['index']} ({place}, {at}, {beat['doing']})"


def read(run: epath.PathLike, name: str) -> dict[str, Any] | None:
    """Content of RUN/processes/NAME; None if it is missing, or half-written on a storage."""
    try:
        values = reading.read_object(epath.Path(run) / "processes" / name)
    except (FileNotFoundError, ValueError):
        return None
    return values if values.keys() >= (FAULT if name == "fault.json" else BEAT) else None


def write_fault(run: epath.PathLike, attempt: int, by: str, why: str, retry: bool) -> None:
    """Write the reason to exit for the other processes of this start; the first one counts."""
    known = read(run, "fault.json")
    if not known or known["attempt"] != attempt:
        fault = {"attempt": attempt, "by": by, "why": why, "retry": retry}
        write(run, "fault.json", fault)


def write(run: epath.PathLike, name: str, values: dict[str, Any]) -> None:
    """RUN/processes/NAME; an older start that still lives may write the same file."""
    path = epath.Path(run) / "processes" / name
    storage.write_whole(path, json.dumps(values).encode(), str(os.getpid()))


def describe(error: BaseException) -> str:
    """One line of an error, with its kind."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def worth_retry(error: BaseException, stepped: bool) -> bool:
    """True if another start may end differently. `stepped`: at least one step was made."""
    final = FloatingPointError | ImportError | data.BadDataError
    if isinstance(error, final) or not isinstance(error, Exception):
        return False
    if stepped:
        return True  # the supervisor limits restarts without a new checkpoint
    if isinstance(error, OSError):
        return error.errno not in PERMANENT
    return not isinstance(error, ValueError)


# --- the supervisor's pipe ----------------------------------------------------------------------


def adopt() -> None:
    """Take the supervisor's pipe out of the environment, so that no child inherits it."""
    global _pipe
    number = os.environ.pop(PIPE, None)
    if number is not None:
        _pipe = int(number)
        os.set_inheritable(_pipe, False)
        os.set_blocking(_pipe, False)


def tell(**values: Any) -> None:
    """Write a line of JSON to the supervisor, if any. If it died, this process stops too."""
    global _pipe
    if _pipe is None:
        return
    try:
        os.write(_pipe, (json.dumps(values) + "\n").encode())
    except BlockingIOError:
        pass  # the pipe is full: a later line repeats it
    except OSError:
        _pipe = None
        # else the user's next start would write into the run beside this one
        os.kill(os.getpid(), signal.SIGTERM)


def this_start() -> tuple[int, int, int]:
    """(index of this process, number of processes, a number shared by this start alone)."""
    index, count = jax.process_index(), jax.process_count()
    drawn = int.from_bytes(os.urandom(3))
    if count > 1:
        drawn = int(multihost_utils.broadcast_one_to_all(np.int32(drawn)))
    return index, count, drawn


@contextlib.contextmanager
def watching(
    run: epath.PathLike, config: schema.WatchConfig, index: int, count: int, attempt: int
) -> Iterator[Watch]:
    """A watch over the block; one that is off (`timeout` 0) still reports errors to the supervisor.

    ValueError for times that contradict each other.
    """
    if config.timeout and not 0 < 2 * config.every <= config.timeout:
        raise ValueError(
            f"watch.every {config.every} is not between 0 and half of watch.timeout"
            f" {config.timeout}"
        )
    watch = Watch(run, config, index=index, count=count, attempt=attempt)
    if config.timeout:
        watch.start()
    try:
        yield watch
    except BaseException as error:
        watch.broke(error)
        raise
    watch.close(watch.state if watch.state in ENDED else "done")


@contextlib.contextmanager
def errors_told() -> Iterator[None]:
    """Report an error that ends the block to the supervisor, unless a watch has done so."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, SystemExit):
            tell(state="failed", why=describe(error), retry=worth_retry(error, False))
        raise
