"""What is done to a run, case by case. Each returns its figures; the script compares the end."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faults_input
from faults_cluster import HOSTS, TIMEOUT, Cluster

from ldm_jax import checkpoint

KILL_AT = 35  # step
BOTH = tuple(range(HOSTS))
GONE = (r"is lost: no sign", r"found: ", r"was killed", r"ended:", r"leaves with", r"ended by JAX")


def back_at_work(cluster: Cluster, since: float) -> float:
    """Seconds from `since` until every host has made a step in a new start."""
    cluster.at_step(1)
    return time.monotonic() - since


def kill(*hosts: int, number: int = signal.SIGKILL) -> Callable[[Cluster], dict]:
    """A signal to the training processes of these hosts; their supervisors stay."""

    def case(cluster: Cluster) -> dict:
        cluster.start()
        cluster.at_step(KILL_AT)
        others = [pid for i in BOTH if i not in hosts and (pid := cluster.worker(i))]
        hit = cluster.signal(number, *hosts)
        begin = time.monotonic()
        # a stopped process ends too: its supervisor kills it
        waits = others or list(hit.values())
        found = {"detected": cluster.others_leave(waits)}
        cluster.others_leave([*hit.values(), *others])
        found["working again"] = back_at_work(cluster, begin)
        return {**found, "codes": cluster.codes()}

    return case


def alone(host: int, number: int = signal.SIGKILL) -> Callable[[Cluster], dict]:
    """The same without supervisors: how the other process ends; then both are started by hand."""

    def case(cluster: Cluster) -> dict:
        cluster.start()
        cluster.at_step(KILL_AT)
        hit = cluster.signal(number, host)
        found = {"detected": cluster.others_leave([cluster.worker(1 - host)])}
        code = cluster.processes[1 - host].wait()
        for pid in hit.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        cluster.start()
        return {**found, "code of the other": code, "codes": cluster.codes()}

    return case


def power_cut(cluster: Cluster) -> dict:
    """Training processes and supervisors of all hosts at once; then started by hand."""
    cluster.start()
    cluster.at_step(KILL_AT)
    pids = [cluster.worker(i) for i in BOTH]
    for pid in [p.pid for p in cluster.processes] + pids:
        os.kill(pid, signal.SIGKILL)
    for process in cluster.processes:
        process.wait()
    begin = time.monotonic()
    cluster.start()
    return {"working again": back_at_work(cluster, begin), "codes": cluster.codes()}


def sigterm(cluster: Cluster) -> dict:
    """SIGTERM to the supervisor of one host, as a scheduler sends it; then started by hand."""
    cluster.start()
    cluster.at_step(KILL_AT)
    pids = [cluster.worker(i) for i in BOTH]
    cluster.processes[1].send_signal(signal.SIGTERM)
    found = {"detected": cluster.others_leave(pids), "codes of the stop": cluster.codes()}
    found["saved at"] = checkpoint.latest_step(cluster.run)
    cluster.start()
    return {**found, "codes": cluster.codes()}


def sigint_to_one(cluster: Cluster) -> dict:
    """Ctrl-C to one training process without a supervisor; then started by hand."""
    cluster.start()
    cluster.at_step(KILL_AT)
    pids = [cluster.worker(i) for i in BOTH]
    cluster.signal(signal.SIGINT, 1)
    found = {"detected": cluster.others_leave(pids), "codes of the stop": cluster.codes()}
    found["saved at"] = checkpoint.latest_step(cluster.run)
    cluster.start()
    return {**found, "codes": cluster.codes()}


def short_stop(cluster: Cluster) -> dict:
    """SIGSTOP for a third of the timeout: nobody may be taken for lost."""
    cluster.start()
    cluster.at_step(KILL_AT)
    before = cluster.signal(signal.SIGSTOP, 1)
    time.sleep(TIMEOUT / 3)
    cluster.signal(signal.SIGCONT, 1)
    codes = cluster.codes()
    return {"codes": codes, "restarts of": [] if not cluster.steps_again() else [*before]}


# --- in the middle of a checkpoint --------------------------------------------------------------


def while_writing(point: str) -> Callable[[Cluster], dict]:
    """SIGKILL to all when a checkpoint has come so far; again until one is left half-written."""
    patterns = {
        "folder": "*orbax-checkpoint-tmp*",
        "arrays": "*orbax-checkpoint-tmp*/params*/**/d/*",
        "optimizer": "*orbax-checkpoint-tmp*/opt_state*/**/d/*",
        "meta": "*orbax-checkpoint-tmp*/meta*/**/*",
    }

    def case(cluster: Cluster) -> dict:
        cluster.start()
        folder, kills, left = cluster.run / "checkpoints", 0, []
        cluster.at_step(KILL_AT)
        while not left and kills < 6:
            known = set(folder.iterdir())
            if point == "named":
                numbers = lambda: {f for f in folder.iterdir() if f.name.isdigit()} - known  # noqa: E731, B023
                cluster.wait("a checkpoint", numbers)
            else:
                cluster.wait("a checkpoint", lambda: any(folder.glob(patterns[point])))
            hit = cluster.signal(signal.SIGKILL, *BOTH)
            begin, kills = time.monotonic(), kills + 1
            cluster.others_leave(list(hit.values()))
            left = [f.name for f in folder.iterdir() if not f.name.isdigit()]
            left = left or (["none: it has its name"] if point == "named" else [])
            again = back_at_work(cluster, begin)
        found = {"half-written": left[:1], "kills": kills, "working again": again}
        return {**found, "codes": cluster.codes()}

    return case


def truncated(cluster: Cluster) -> dict:
    """The largest file of the newest checkpoint is cut in half while nothing runs."""
    cluster.start()
    cluster.at_step(KILL_AT)
    cluster.processes[0].send_signal(signal.SIGTERM)
    cluster.codes()
    newest = cluster.run / "checkpoints" / str(checkpoint.latest_step(cluster.run))
    largest = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    begin = time.monotonic()
    cluster.start()
    found = {"file": str(largest.relative_to(cluster.run)), "saved at": int(newest.name)}
    codes = cluster.codes()
    if any(codes):  # refused by name: what it says to do is done
        found |= {"detected": time.monotonic() - begin, "codes of the refusal": codes}
        shutil.rmtree(newest)
        cluster.start()
        codes = cluster.codes()
    return {**found, "codes": codes}


# --- storage ------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A tmpfs of that size at `folder`. PermissionError where it may not be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    size = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "none", str(folder)]
    if subprocess.run(size, check=False).returncode:
        raise PermissionError(f"cannot mount a tmpfs at {folder}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def disk_full(cluster: Cluster) -> dict:
    """The file system of the run is filled to the last byte, and emptied after a failure."""
    ballast = cluster.run.parent / "ballast"
    cluster.start()
    cluster.at_step(KILL_AT)
    saved = checkpoint.latest_step(cluster.run)
    begin = time.monotonic()
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    pids = [cluster.worker(i) for i in BOTH]
    found = {"detected": cluster.others_leave(pids)}
    found["kept"] = checkpoint.latest_step(cluster.run)
    assert found["kept"] >= saved
    ballast.unlink()
    found["working again"] = back_at_work(cluster, begin)
    return {**found, "codes": cluster.codes()}


# --- many ---------------------------------------------------------------------------------------


def random_kills(cluster: Cluster, count: int = 20, seed: int = 0) -> dict:
    """SIGKILL of a random host or both at random times, also in start-up and recovery."""
    rng, kills, slowest = random.Random(seed), [], 0.0
    cluster.start()
    begin = time.monotonic()
    while len(kills) < count:
        hosts = rng.choice([(0,), (1,), BOTH])
        # half of them while it trains, half at any time after the one before
        if rng.random() < 0.5:
            cluster.at_step(1)
            time.sleep(rng.uniform(0, 2))
        else:
            time.sleep(rng.uniform(0, 25))
        if any(p.poll() is not None for p in cluster.processes):
            break  # done, or given up
        hit = cluster.signal(signal.SIGKILL, *hosts)
        if not hit:
            continue
        kills.append(max(cluster.made(i) for i in BOTH))
        since = time.monotonic()
        cluster.others_leave(list(hit.values()))
        slowest = max(slowest, time.monotonic() - since)
    found = {"kills": len(kills), "seconds": time.monotonic() - begin}
    return {**found, "codes": cluster.codes()}


# --- input --------------------------------------------------------------------------------------


def restarted(cluster: Cluster) -> dict:
    """One kill between two bad batches; the comparison is with an uninterrupted run on them."""
    cluster.start()
    cluster.at_step(faults_input.BAD_STEPS[0] + 4)
    begin = time.monotonic()
    hit = cluster.signal(signal.SIGKILL, 1)
    cluster.others_leave(list(hit.values()))
    return {"working again": back_at_work(cluster, begin), "codes": cluster.codes()}


def hung_reader(cluster: Cluster) -> dict:
    """Every image file becomes a pipe that nobody writes to, as storage that no longer answers."""
    images = faults_input.images_of(cluster.run.parents[1])
    aside = images.with_name(images.name + ".aside")
    cluster.start()
    cluster.at_step(KILL_AT)
    pids = [cluster.worker(i) for i in BOTH]
    begin = time.monotonic()
    images.rename(aside)
    for path in aside.rglob("*.png"):
        pipe = images / path.relative_to(aside)
        pipe.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(pipe)
    try:
        found = {"detected": cluster.others_leave(pids)}
    finally:
        shutil.rmtree(images)
        aside.rename(images)
    found["working again"] = back_at_work(cluster, begin)
    return {**found, "codes": cluster.codes()}


# name: (what is done, stage of the config, with supervisors, function)
CASES: dict[str, tuple[str, str, bool, Callable[[Cluster], dict]]] = {
    "kill_one": ("SIGKILL of one host's process", "clean", True, kill(1)),
    "kill_coordinator": ("SIGKILL of the coordinator", "clean", True, kill(0)),
    "kill_all": ("SIGKILL of all processes", "clean", True, kill(*BOTH)),
    "power_cut": ("SIGKILL of all, supervisors too", "clean", True, power_cut),
    "sigterm": ("SIGTERM to one host", "clean", True, sigterm),
    "sigint": ("Ctrl-C to one process, no supervisor", "clean", False, sigint_to_one),
    "sigstop": ("SIGSTOP of one host", "clean", True, kill(1, number=signal.SIGSTOP)),
    "sigstop_coordinator": (
        "SIGSTOP of the coordinator",
        "clean",
        True,
        kill(0, number=signal.SIGSTOP),
    ),
    "short_stop": ("SIGSTOP for a third of the timeout", "clean", True, short_stop),
    "kill_one_alone": ("SIGKILL of one, no supervisor", "clean", False, alone(1)),
    "coordinator_alone": ("SIGKILL of the coordinator, no supervisor", "clean", False, alone(0)),
    "sigstop_alone": (
        "SIGSTOP of one, no supervisor",
        "clean",
        False,
        alone(1, number=signal.SIGSTOP),
    ),
    "write_folder": ("SIGKILL in a save: its folder", "clean", True, while_writing("folder")),
    "write_arrays": ("SIGKILL in a save: parameters", "clean", True, while_writing("arrays")),
    "write_optimizer": ("SIGKILL in a save: optimizer", "clean", True, while_writing("optimizer")),
    "write_meta": ("SIGKILL in a save: its meta", "clean", True, while_writing("meta")),
    "write_named": ("SIGKILL right after a save", "clean", True, while_writing("named")),
    "truncated": ("file of the newest checkpoint cut in half", "clean", True, truncated),
    "disk_full": ("disk full (tmpfs)", "clean", True, disk_full),
    "hung_reader": ("storage of the images does not answer", "images", True, hung_reader),
    "corrupt_record": ("three unreadable images, and a kill", "folder", True, restarted),
    "nan_batch": ("three batches with NaN, and a kill", "nan", True, restarted),
    "loss_spike": ("three batches with huge latents, and a kill", "spike", True, restarted),
    "random_kills": ("20 random SIGKILLs in a row", "long", True, random_kills),
}
