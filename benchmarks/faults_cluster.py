"""Two hosts on one machine: `ldm-train` processes of two CPU devices each, joined over Gloo."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from etils import epath

from ldm_jax.runtime import checkpoint, rundir
from ldm_jax.train.run import watchdog

HOSTS = 2
EVERY, TIMEOUT, DELAY = 0.5, 15.0, 1.0  # seconds: signs of life, lost without one, first restart
LIMIT = 900.0  # seconds after which anything counts as hung
POLL = 0.005
AGAIN = re.compile(r"last checkpoint is step (\d+), (\d+) steps are made again")
WATCH = f"--watch.every {EVERY} --watch.timeout {TIMEOUT} --watch.stall 90".split()


class Hung(Exception):
    """Something that should have ended did not."""


class Cluster:
    """The hosts of one run. Use with `with`: nothing outlives it."""

    def __init__(self, run: Path, logs: Path, config: str, flags: list[str], supervised: bool):
        self.run, self.config, self.flags, self.supervised = run, config, flags, supervised
        self.processes: list[subprocess.Popen] = []
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"{i}.log" for i in range(HOSTS)]
        for log in self.logs:
            log.write_text("")

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *exception: object) -> None:
        pids = [pid for i in range(HOSTS) if (pid := self.worker(i))] if self.processes else []
        for process in self.processes:
            process.kill()
            process.wait()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start(self) -> None:
        """Starts both hosts, as one would by hand on each."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles in half the time
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # small programs are kept too
        }
        restart = f"--restart on-failure --max-restarts 50 --restart-delay {DELAY}".split()
        self.processes = []
        for i in range(HOSTS):
            place = ["--distributed", f"127.0.0.1:{port},{HOSTS},{i}"]
            command = [sys.executable, "-m", "ldm_jax.train.main", self.config, *place]
            command += ["--workdir", str(self.run), *self.flags, *WATCH]
            command.append("--no-compilation-cache")  # ours: JAX's own, as the environment has it
            command += restart if self.supervised else []
            with self.logs[i].open("a") as log:
                self.processes.append(
                    subprocess.Popen(command, stderr=log, stdout=log, env=environment)
                )

    # --- looking --------------------------------------------------------------------------------

    def beat(self, host: int) -> dict:
        """The last sign of life of a host's process."""
        return watchdog.read(self.run, f"{host}.json") or {}

    def worker(self, host: int) -> int | None:
        """Pid of the process that trains, while there is one."""
        parent = self.processes[host].pid
        if not self.supervised:
            return parent if self.processes[host].poll() is None else None
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
            alive = [int(pid) for pid in children if running(int(pid))]
            return alive[0] if alive else None
        return None

    def wait(self, what: str, until: Callable[[], object], limit: float = LIMIT) -> float:
        """Seconds until `until()` is true. `Hung` past the limit or when all hosts have ended."""
        begin = time.monotonic()
        while not until():
            if self.ended() and not until():
                raise Hung(f"ended while waiting for {what}: {self.tail()}")
            if time.monotonic() - begin > limit:
                raise Hung(f"no {what} within {limit:.0f} s: {self.tail()}")
            time.sleep(POLL)
        return time.monotonic() - begin

    def at_step(self, step: int) -> float:
        """Waits until every host has made `step`, in the start that is now running."""
        return self.wait(f"step {step}", lambda: all(self.made(i) >= step for i in range(HOSTS)))

    def made(self, host: int) -> int:
        """Steps of a host whose process lives."""
        beat = self.beat(host)
        alive = beat.get("pid") == self.worker(host) and beat.get("state") == "running"
        return (beat.get("step") or 0) if alive else 0

    def ended(self) -> bool:
        """Whether no process of the run is left."""
        return all(p.poll() is not None for p in self.processes)

    def codes(self) -> list[int]:
        """Exit codes, when all hosts have ended."""
        until = time.monotonic() + LIMIT
        try:
            return [p.wait(max(0.1, until - time.monotonic())) for p in self.processes]
        except subprocess.TimeoutExpired as error:
            raise Hung(f"still running after {LIMIT:.0f} s: {self.tail()}") from error

    def tail(self) -> str:
        """The last lines of both."""
        return " | ".join(log.read_text(errors="replace")[-1500:] for log in self.logs)

    def marks(self) -> list[int]:
        """How much each host has printed."""
        return [len(log.read_text(errors="replace")) for log in self.logs]

    def said(self, since: list[int], *patterns: str) -> list[str]:
        """Lines after `since` that match one of the patterns, each once, first host first."""
        text = "\n".join(log.read_text(errors="replace")[n:] for log, n in zip(self.logs, since))
        text = text.replace(f"{self.run.parent.parent}/", "")  # where it was run is nobody's matter
        # the log of a process may be printed beside what it says
        known = (line.strip().removeprefix("INFO:ldm_jax:") for line in text.splitlines())
        lines = dict.fromkeys(known)
        return [line for line in lines if any(re.search(p, line) for p in patterns)]

    def steps_again(self) -> list[int]:
        """Steps made again at every restart: the larger figure of the two hosts."""
        found = [[int(n) for _, n in AGAIN.findall(log.read_text())] for log in self.logs]
        count = max(map(len, found))
        return [max(f[i] for f in found if i < len(f)) for i in range(count)]

    # --- breaking -------------------------------------------------------------------------------

    def signal(self, number: int, *hosts: int) -> dict[int, int]:
        """Sends a signal to the training processes of these hosts; {host: pid}."""
        pids = {host: self.worker(host) for host in hosts}
        for pid in pids.values():
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        return {host: pid for host, pid in pids.items() if pid is not None}

    def others_leave(self, pids: list[int]) -> float:
        """Seconds until these processes have ended."""
        return self.wait("the end of the others", lambda: not any(map(running, pids)), 120.0)


def running(pid: int) -> bool:
    """Whether a process still runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# --- comparing ----------------------------------------------------------------------------------


def differences(run: Path, other: Path) -> list[str]:
    """What differs between the last states of two runs, bit by bit; and between their losses."""
    step, like = checkpoint.latest_step(run), checkpoint.latest_step(other)
    if step != like:
        return [f"step {step} instead of {like}"]
    folders = [epath.Path(r) / "checkpoints" / str(step) for r in (run, other)]
    metas = [checkpoint.read_meta(folder) for folder in folders]
    parts = sorted(metas[0]["checksums"].keys() | metas[1]["checksums"].keys())
    odd = [n for n in ("bad_steps", "skips") if metas[0].get(n) != metas[1].get(n)]
    trees = [checkpoint.restore_parts(r, step, parts) for r in (run, other)]
    first, second = (flat(tree) for tree in trees)
    if first.keys() != second.keys():
        return [*odd, "other arrays"]
    odd += [n for n in first if first[n].tobytes() != second[n].tobytes()]
    losses = [{m["step"]: m.get("loss") for m in rundir.read_metrics(r)} for r in (run, other)]
    shared = losses[0].keys() & losses[1].keys()
    return odd + [f"loss at {s}" for s in sorted(shared) if losses[0][s] != losses[1][s]]


def flat(tree: object, prefix: str = "") -> dict[str, np.ndarray]:
    """{path: array} of nested containers of arrays."""
    if isinstance(tree, dict):
        items = [(str(k), v) for k, v in tree.items()]
    elif isinstance(tree, list | tuple):
        items = [(str(i), v) for i, v in enumerate(tree)]
    elif tree is None:
        return {}
    else:
        return {prefix: np.asarray(tree)}
    return {n: a for k, v in items for n, a in flat(v, f"{prefix}/{k}").items()}


def save_json(path: Path, values: object) -> None:
    """Writes JSON whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(values, indent=1) + "\n")
    draft.replace(path)
