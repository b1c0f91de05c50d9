"""What is done to a run, case by case. Each returns its figures; the script compares the end."""

import contextlib
import dataclasses
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

from ldm_jax.runtime import checkpoint, cli

NEVER_READ = "every image on storage that does not answer"
BAD_IMAGES = "three unreadable images, and a SIGKILL after the first"
BAD_LATENTS = "a batch with NaN, two with huge latents, and a SIGKILL between"
BOTH = tuple(range(HOSTS))
NOT_WRITTEN = r"was not written|leaves with code"
SAID = (r"is lost: no sign|found: |was killed|ended:|leaves with|ended by JAX", NOT_WRITTEN)
SAID += (r"moved to|going on from step|left half-written|removed", r"cannot be used")


def back_at_work(cluster: Cluster, since: float) -> float:
    """Seconds from `since` until every host has made a step in a new start."""
    cluster.at_step(1)
    return time.monotonic() - since


def kill(*hosts: int, number: int = signal.SIGKILL) -> Callable[[Cluster], dict]:
    """A signal to the training processes of these hosts; their supervisors stay."""

    def case(cluster: Cluster) -> dict:
        others = [pid for i in BOTH if i not in hosts and (pid := cluster.worker(i))]
        hit = cluster.signal(number, *hosts)
        begin = time.monotonic()
        found = {"detected": cluster.others_leave(others)} if others else {}
        cluster.others_leave([*hit.values()])  # a stopped one too: its supervisor kills it
        return {**found, "working again": back_at_work(cluster, begin)}

    return case


def alone(host: int, number: int = signal.SIGKILL) -> Callable[[Cluster], dict]:
    """The same without supervisors: how the other process ends; then both are started by hand."""

    def case(cluster: Cluster) -> dict:
        hit = cluster.signal(number, host)
        found = {"detected": cluster.others_leave([cluster.worker(1 - host)])}
        code = cluster.processes[1 - host].wait()
        for pid in hit.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        cluster.start()
        return {**found, "code of the other": code}

    return case


def power_cut(cluster: Cluster) -> dict:
    """Training processes and supervisors of all hosts at once; then started by hand."""
    pids = [cluster.worker(i) for i in BOTH]
    for pid in [p.pid for p in cluster.processes] + pids:
        os.kill(pid, signal.SIGKILL)
    for process in cluster.processes:
        process.wait()
    begin = time.monotonic()
    cluster.start()
    return {"working again": back_at_work(cluster, begin)}


def stop(cluster: Cluster) -> dict:
    """SIGTERM to one host (its supervisor, if it has one), as a scheduler sends it."""
    pids = [cluster.worker(i) for i in BOTH]
    cluster.processes[1].send_signal(signal.SIGTERM if cluster.supervised else signal.SIGINT)
    found = {"detected": cluster.others_leave(pids), "codes of the stop": cluster.codes()}
    assert found["codes of the stop"] == [cli.INTERRUPTED] * HOSTS, found
    return {**found, "saved at": checkpoint.latest_step(cluster.run)}


def stop_and_start(cluster: Cluster) -> dict:
    """The same, then started by hand."""
    found = stop(cluster)
    cluster.start()
    return found


def short_stop(cluster: Cluster) -> dict:
    """SIGSTOP for a third of the timeout: nobody may be taken for lost."""
    before = [cluster.worker(i) for i in BOTH]
    cluster.signal(signal.SIGSTOP, 1)
    time.sleep(TIMEOUT / 3)
    cluster.signal(signal.SIGCONT, 1)
    step = max(cluster.made(i) for i in BOTH)
    cluster.at_step(step + 3)
    assert before == [cluster.worker(i) for i in BOTH]
    return {}


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
        folder, kills, left = cluster.run / "checkpoints", 0, []
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
        return {"half-written": left[:1], "kills": kills, "working again": again}

    return case


def truncated(cluster: Cluster) -> dict:
    """The largest file of the newest checkpoint is cut in half while nothing runs."""
    stop(cluster)
    newest = cluster.run / "checkpoints" / str(checkpoint.latest_step(cluster.run))
    largest = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    begin = time.monotonic()
    cluster.start()
    found = {"file": str(largest.relative_to(cluster.run)), "saved at": int(newest.name)}
    again = back_at_work(cluster, begin)
    assert (cluster.run / "damaged" / newest.name).exists(), cluster.tail()
    return {**found, "working again": again}


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
    saved = checkpoint.latest_step(cluster.run)
    begin, since = time.monotonic(), cluster.marks()
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    failed = lambda: cluster.said(since, NOT_WRITTEN)  # noqa: E731
    found = {"detected": cluster.wait("a failed save", failed)}
    time.sleep(2.0)
    found["kept"] = checkpoint.latest_step(cluster.run)
    assert found["kept"] >= saved
    ballast.unlink()
    cluster.wait("the next one", lambda: (checkpoint.latest_step(cluster.run) or 0) > found["kept"])
    return {**found, "saving again": time.monotonic() - begin}


# --- many ---------------------------------------------------------------------------------------


def random_kills(cluster: Cluster, count: int = 20, seed: int = 0) -> dict:
    """SIGKILL of a random host or both at random times, also in start-up and recovery."""
    rng, kills, slowest = random.Random(seed), [], 0.0
    begin = time.monotonic()
    while len(kills) < count:
        hosts = rng.choice([(0,), (1,), BOTH])
        # half of them while it trains, half at any time after the one before
        if rng.random() < 0.5:
            cluster.at_step(1)
            time.sleep(rng.uniform(0, 6))  # a checkpoint comes every second or two
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
    return {"kills": len(kills), "detected": slowest, "seconds": time.monotonic() - begin}


# --- input --------------------------------------------------------------------------------------


def restarted(cluster: Cluster) -> dict:
    """One kill between two bad batches; the comparison is with an uninterrupted run on them."""
    cluster.at_step(faults_input.BAD_STEPS[0] + 2)
    return kill(1)(cluster)


def hung_reader(cluster: Cluster) -> dict:
    """Every image file becomes a pipe that nobody writes to, as storage that no longer answers."""
    images = faults_input.images_of(cluster.run.parents[1])
    aside = images.with_name(images.name + ".aside")
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
    return {**found, "working again": back_at_work(cluster, begin)}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, and what is done to it, one after the other; a case finds it at work."""

    stage: str
    """Of the config."""
    steps: int
    supervised: bool
    cases: dict[str, tuple[str, Callable[[Cluster], dict]]]
    """{name: (what it is, function)}"""


STOP = signal.SIGSTOP
SUPERVISED = {
    "kill_one": ("SIGKILL of one host's process", kill(1)),
    "kill_coordinator": ("SIGKILL of the coordinator: lost", kill(0)),
    "kill_all": ("SIGKILL of all processes", kill(*BOTH)),
    "sigterm": ("SIGTERM to one host; started by hand", stop_and_start),
    "sigstop": ("SIGSTOP of one host", kill(1, number=STOP)),
    "write_folder": ("SIGKILL of all in a save: its folder", while_writing("folder")),
    "write_arrays": ("SIGKILL of all in a save: parameters", while_writing("arrays")),
    "write_optimizer": ("SIGKILL of all in a save: optimizer", while_writing("optimizer")),
    "write_meta": ("SIGKILL of all in a save: its meta", while_writing("meta")),
    "write_named": ("SIGKILL of all right after a save", while_writing("named")),
    "truncated": ("stopped; a file of the newest checkpoint cut in half", truncated),
    "disk_full": ("disk full (tmpfs), then room again", disk_full),
    "sigstop_coordinator": ("SIGSTOP of the coordinator", kill(0, number=STOP)),
    "short_stop": ("SIGSTOP for a third of the timeout", short_stop),
    "power_cut": ("SIGKILL of all, supervisors too; started by hand", power_cut),
}
BY_HAND = {
    "kill_one_alone": ("SIGKILL of one, no supervisor", alone(1)),
    "coordinator_alone": ("SIGKILL of the coordinator, no supervisor", alone(0)),
    "sigstop_alone": ("SIGSTOP of one, no supervisor", alone(1, number=STOP)),
    "sigint_alone": ("Ctrl-C to one, no supervisor", stop_and_start),
}
RUNS = {
    # a case uses up to two intervals between checkpoints
    "supervised": Run("clean", 2 * faults_input.SAVE * len(SUPERVISED), True, SUPERVISED),
    "by_hand": Run("clean", 60, False, BY_HAND),
    "random": Run("clean", 240, True, {"random": ("20 random SIGKILLs in a row", random_kills)}),
    "folder": Run("folder", 20, True, {"corrupt_record": (BAD_IMAGES, restarted)}),
    "latents": Run("latents", 20, True, {"nan_and_spike": (BAD_LATENTS, restarted)}),
    "images": Run("images", 20, True, {"hung_reader": (NEVER_READ, hung_reader)}),
}
