"""`ldm-train ... --restart on-failure`: run the command in a child process, again if it fails.

The child reports its progress through a pipe (`watchdog.tell`). With several hosts each has a
supervisor that restarts its own process; the new processes meet in jax.distributed's start.
"""

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

from tyro.conf import arg

from ldm_jax.runtime import checkpoint, cli
from ldm_jax.runtime.log import LOG
from ldm_jax.train.run import watchdog

LONGEST_DELAY = 300.0  # seconds
USAGE = 2  # exit code for a wrong command line
TOOK = (0, cli.INTERRUPTED, USAGE, 130)  # exit codes without a restart
POLL = 0.1  # seconds


@dataclasses.dataclass(frozen=True)
class Restart:
    """Options of a run that is started again when it fails."""

    restart: Literal["never", "on-failure"] = "never"
    """`on-failure` starts the run again from its last checkpoint when it fails, hangs or is
    killed."""
    max_restarts: int = 5
    """Restarts in a row without a new checkpoint."""
    restart_delay: Annotated[float, arg(metavar="SECONDS")] = 5.0
    """Wait before the first restart; doubled for each more."""


@dataclasses.dataclass
class End:
    """The end of a process."""

    code: int
    """Exit code; negative: the signal that killed it."""
    told: dict[str, Any]
    """Its last report."""
    hung: bool = False
    """True if the supervisor killed it, because it gave no sign of life."""


def is_asked_for(restart: Restart) -> bool:
    """True if --restart is on. ValueError for numbers out of range, or without effect."""
    for name in ("max_restarts", "restart_delay"):
        value, flag = getattr(restart, name), f"--{name.replace('_', '-')}"
        if not 0 <= value < 1e6:
            raise ValueError(f"{flag} {value} is not a number from 0 on")
        if restart.restart == "never" and value != getattr(Restart, name):
            raise ValueError(f"{flag} has no effect without --restart on-failure")
    return restart.restart == "on-failure"


def say(message: str) -> None:
    """Log a line of the supervisor."""
    LOG.info("ldm-train supervisor: %s", message)


def supervise(command: Sequence[str], restart: Restart, say: Callable[[str], None] = say) -> int:
    """Run `command` until it succeeds, is stopped, or a restart cannot help; returns its exit code.

    SIGTERM and Ctrl-C are passed on, and end the restarts. A process that stops giving signs of
    life is killed.
    """
    failures, best = 0, -1
    with _signals() as caught:
        while True:
            end = _run(command, caught)
            code = 128 - end.code if end.code < 0 else end.code
            if caught:
                return cli.INTERRUPTED if -end.code in caught else code
            if end.code in TOOK or end.told.get("state") == "done":
                return 0 if end.told.get("state") == "done" else code
            _publish(end)
            reason = why(end)
            if not end.told.get("retry", True):
                say(f"{reason}; another start would end the same way")
                return code
            saved = newest(end.told.get("run"))
            failures, best = (0 if saved > best else failures), max(saved, best)
            failures += 1
            if failures > restart.max_restarts:
                say(
                    f"{reason}; {restart.max_restarts} restarts without a new checkpoint: gives up"
                    " (--max-restarts)"
                )
                return code
            delay = min(restart.restart_delay * 2 ** (failures - 1), LONGEST_DELAY)
            say(f"{reason}; {lost(end, saved)}; restart {failures} in {delay:g} s")
            if _sleep(delay, caught) or _old_coordinator_left(end.told, caught):
                return cli.INTERRUPTED


def why(end: End) -> str:
    """Cause of a process's end, from its report, its exit code, and the files of the others."""
    told = end.told
    me = watchdog.who(told) if "host" in told else "the process"
    if end.hung:
        return f"{me} gave no sign of life for {told['timeout']:.0f} s and was killed"
    if told.get("state") in ("failed", "lost"):
        return f"{me}: {told['why']}" if told["state"] == "failed" else told["why"]
    how = f"{signal.Signals(-end.code).name}" if end.code < 0 else f"code {end.code}"
    if end.code < 0 and not _aborted(end):
        return f"{me} was killed by {how}"
    return f"{me} was ended by JAX with {how}: {_others(told) or 'see what it printed'}"


def _aborted(end: End) -> bool:
    """True if JAX aborted one of several processes, as it does when the coordinator is gone."""
    return end.code == -signal.SIGABRT and end.told.get("count", 1) > 1


def lost(end: End, saved: int) -> str:
    """Text on the steps that will be repeated."""
    step = end.told.get("step")
    place = f"the last checkpoint is step {saved}" if saved >= 0 else "no checkpoint yet"
    if step is None:
        return f"{place}, no step was made since"
    return f"{place}, {max(step - max(saved, 0), 0)} steps are made again"


def newest(run: str | None) -> int:
    """Step of the last complete checkpoint; -1 without one."""
    if run is None:
        return -1
    try:
        return max(checkpoint.saved_steps(run), default=-1)
    except Exception as error:  # any error of a storage: it may be back at the restart
        say(f"cannot look for checkpoints of {run}: {watchdog.describe(error)}")
        return -1


# --- one process --------------------------------------------------------------------------------


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Yields the list of the stop signals received so far."""
    caught: list[int] = []
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as `nohup` has it
        numbers.append(signal.SIGHUP)
    before = {n: signal.signal(n, lambda number, _: caught.append(number)) for n in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(command: Sequence[str], caught: list[int]) -> End:
    """Start the command and watch it until it ends."""
    reader, writer = os.pipe()
    environment = {**os.environ, watchdog.PIPE: str(writer)}
    child = subprocess.Popen(list(command), env=environment, pass_fds=(writer,))
    os.close(writer)
    end, rest, silent, passed = End(0, {}), b"", 0.0, 0
    last = time.monotonic()
    try:
        while True:
            code = child.poll()  # before the last read, which then misses nothing
            lines, rest = _lines(reader, rest)
            for line in lines:
                if end.told.get("state") not in watchdog.ENDED:
                    end.told |= line
            now = time.monotonic()
            silent = 0.0 if lines else silent + min(now - last, 10 * POLL)
            last = now
            if code is not None:
                end.code = code
                return end
            if len(caught) > passed:
                passed = len(caught)
                child.send_signal(signal.SIGTERM)
            limit = end.told.get("timeout")
            if limit and silent > limit and end.told["state"] not in watchdog.ENDED:
                end.hung = True
                child.kill()
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        os.close(reader)


def _lines(reader: int, rest: bytes) -> tuple[list[dict], bytes]:
    """(reports of the process within a tenth of a second, the beginning of an unfinished line)."""
    ready, _, _ = select.select([reader], [], [], POLL)
    data = os.read(reader, 1 << 16) if ready else b""
    if ready and not data:  # closed: the process is ending
        time.sleep(POLL)
    *whole, rest = (rest + data).split(b"\n")
    return [json.loads(line) for line in whole], rest


def _sleep(seconds: float, caught: list[int]) -> bool:
    """Wait; returns True if a signal to stop came meanwhile."""
    until = time.monotonic() + seconds
    while not caught and time.monotonic() < until:
        time.sleep(POLL)
    return bool(caught)


# --- several hosts ------------------------------------------------------------------------------


def _publish(end: End) -> None:
    """Write the fault of a killed process, which could not do so itself, for the others."""
    told = end.told
    if end.code >= 0 or told.get("count", 1) == 1 or told["state"] in watchdog.ENDED:
        return
    if _aborted(end):  # not the cause
        return
    with contextlib.suppress(Exception):  # else they detect it themselves
        by = f"the supervisor of process {told['index']}"
        watchdog.write_fault(told["run"], told["attempt"], by, why(end), True)


def _others(told: dict[str, Any]) -> str | None:
    """The other processes that are gone, after waiting for a few signs of life."""
    if told.get("count", 1) == 1:
        return None

    def fault() -> str | None:
        seen = watchdog.read(told["run"], "fault.json")
        return seen["why"] if seen and seen["attempt"] == told["attempt"] else None

    def beats() -> dict[int, dict]:
        indices = (i for i in range(told["count"]) if i != told["index"])
        seen = {i: watchdog.read(told["run"], f"{i}.json") for i in indices}
        return {i: b for i, b in seen.items() if b and b["attempt"] == told["attempt"]}

    with contextlib.suppress(Exception):
        before, until = beats(), time.monotonic() + watchdog.MISSED * told["every"]
        while (seen := fault()) is None and time.monotonic() < until:
            time.sleep(min(1.0, told["every"]))
        if seen is not None:
            return seen
        after = beats()
        gone = [b for i, b in after.items() if before.get(i) == b and b["state"] == "running"]
        return ", ".join(map(watchdog.who, gone)) + " is gone" if gone else None
    return None


def _old_coordinator_left(told: dict[str, Any], caught: list[int]) -> bool:
    """Wait until the former process 0 is gone: it would refuse this one's new start.

    Returns True if a signal to stop came meanwhile.
    """
    if told.get("count", 1) == 1 or told["index"] == 0:
        return False
    rounds, beat, same = int(2 * told["timeout"] / told["every"]) + 1, None, 0
    for _ in range(rounds):
        try:
            status = watchdog.read(told["run"], "0.json")
        except Exception:
            status = None
        if not status or status["attempt"] != told["attempt"] or status["state"] in watchdog.ENDED:
            return False
        same = same + 1 if status["beat"] == beat else 0
        beat = status["beat"]
        if same == watchdog.MISSED:
            return False
        if _sleep(told["every"], caught):
            return True
    return False
