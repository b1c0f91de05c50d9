"""Which process of how many this is: from what the launcher left in the environment.

    Cloud TPU   GKE: TPU_WORKER_HOSTNAMES (or TPU_PROCESS_ADDRESSES) of more than one host, or
                MEGASCALE_NUM_SLICES above 1; elsewhere chips, and the metadata of the machine
    Open MPI    OMPI_COMM_WORLD_SIZE, _RANK, _LOCAL_RANK, _LOCAL_SIZE
    SLURM       SLURM_JOB_ID, SLURM_STEP_NODELIST, SLURM_STEP_NUM_TASKS, SLURM_PROCID,
                SLURM_LOCALID: those of a step (`srun`), not of a shell in an allocation
    Kubernetes  JOB_COMPLETION_INDEX of an indexed Job or JobSet, and the package `kubernetes`
    any         JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (or
                JOB_COMPLETION_INDEX); these hold before the others

One process, however it was started, is left alone: it never waits for anybody.
"""

import dataclasses
import importlib.util
import os
import re
import sys
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

SECONDS = 300  # that a process waits for the others
TPU_TUNED = ("TPU_PROCESS_BOUNDS", "TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES")
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


@dataclasses.dataclass(frozen=True)
class Place:
    """One process of several."""

    launcher: str
    address: str | None = None
    """HOST:PORT of process 0; None: JAX finds out the rest by itself."""
    processes: int | None = None
    index: int | None = None
    devices: tuple[int, ...] | None = None
    """The node's devices that are this process's; None: all that it sees."""


def find(environ: Mapping[str, str] | None = None) -> Place | None:
    """The place that a launcher gave to this process, perhaps as the only one; None without one.

    ValueError where a launcher started several but does not say enough to join them.
    """
    environ = os.environ if environ is None else environ
    for look in (_given, _cloud_tpu, _open_mpi, _slurm, _kubernetes):
        place = look(environ)
        if place is not None:
            return place
    return None


def parse(value: str) -> Place:
    """`ADDRESS:PORT,PROCESSES,INDEX`. ValueError for anything else."""
    parts = value.split(",")
    numbers = all(part.isdigit() for part in parts[1:])
    if len(parts) != 3 or not numbers or ":" not in parts[0]:
        raise ValueError(f"--distributed {value!r} is not ADDRESS:PORT,PROCESSES,INDEX, nor off")
    place = Place("--distributed", parts[0], int(parts[1]), int(parts[2]))
    if place.index >= place.processes:
        raise ValueError(
            f"--distributed {value!r}: INDEX counts from 0, so the last of {place.processes}"
            f" processes is {place.processes - 1}"
        )
    return place


def join(place: Place) -> None:
    """Starts jax.distributed and waits for the others; nothing for one process.

    RuntimeError if they cannot be joined. If they do not come within SECONDS, says so and exits.
    """
    if place.processes == 1:
        return
    who = f"process {place.index} of {place.processes}" if place.processes else "this process"
    where = f" at {place.address}" if place.address else ""
    if not place.index:
        sys.stderr.write(
            f"{place.launcher}: {who} waits for the others{where} (up to {SECONDS} s; --distributed"
            " off runs alone)\n"
        )
    known = {
        "coordinator_address": place.address,
        "num_processes": place.processes,
        "process_id": place.index,
        "local_device_ids": place.devices,
        # else JAX takes one device where it knows the launcher
        "cluster_detection_method": "deactivate",
    }
    remedy = (
        "start the same command in every process, check that the address can be reached, or give"
        " --distributed ADDRESS:PORT,PROCESSES,INDEX or --distributed off"
    )

    def give_up() -> None:  # JAX would abort with a page of its own
        sys.stderr.write(
            f"{place.launcher}: error: {who} has waited {SECONDS} s for the others{where}:"
            f" {remedy}\n"
        )
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **(known if place.address else {}), initialization_timeout=SECONDS + 60
        )
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise RuntimeError(
            f"{place.launcher}: {who} could not join the others{where} ({why[:200]}): {remedy}"
        ) from error
    finally:
        timer.cancel()


# --- launchers ----------------------------------------------------------------------------------


def _given(environ: Mapping[str, str]) -> Place | None:
    """What the user or a job template wrote down for JAX itself."""
    address, processes = environ.get("JAX_COORDINATOR_ADDRESS"), environ.get("JAX_NUM_PROCESSES")
    index = environ.get("JAX_PROCESS_ID", environ.get("JOB_COMPLETION_INDEX"))
    if processes is None:
        return None  # the address alone may be meant for a launcher below
    if not address or index is None:
        raise ValueError(
            f"JAX_NUM_PROCESSES is {processes}, but JAX_COORDINATOR_ADDRESS (HOST:PORT of process"
            " 0) or JAX_PROCESS_ID (or JOB_COMPLETION_INDEX) is not set: set all three or none"
        )
    numbers = _numbers({"JAX_NUM_PROCESSES": processes, "JAX_PROCESS_ID": index})
    return Place("JAX_NUM_PROCESSES", address, *numbers)


def _open_mpi(environ: Mapping[str, str]) -> Place | None:
    """`mpirun`: version 4 says where it runs, version 5 does not."""
    names = [f"OMPI_COMM_WORLD_{n}" for n in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")]
    if not all(name in environ for name in names):
        return None
    size, rank, here, local = _numbers({name: environ[name] for name in names})
    address = environ.get("JAX_COORDINATOR_ADDRESS")
    uri = re.search(
        r"tcp://(.+?)[,:]|tcp6://\[(.+?)[,\]]", environ.get("OMPI_MCA_orte_hnp_uri", "")
    )
    seed = environ.get("OMPI_MCA_orte_hnp_uri", environ.get("PMIX_NAMESPACE", "")).split(";")[0]
    if address is None and size > 1:
        if uri is None and here < size:
            raise ValueError(
                "Open MPI 5 does not say where process 0 runs: give it with mpirun -x"
                " JAX_COORDINATOR_ADDRESS=HOST:PORT"
            )
        host = "127.0.0.1" if here == size else uri[1] or uri[2]
        address = f"{host}:{_port(environ, zlib.crc32(seed.encode()))}"
    return Place("Open MPI", address, size, rank, _devices(environ, local, here))


def _slurm(environ: Mapping[str, str]) -> Place | None:
    """A step of `srun`. An allocation's shell and a batch script have no list of the step's nodes,
    or a step of one task."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS"))
    if tasks is None or not all(name in environ for name in names):
        return None
    values = {name: environ[name] for name in names if name != "SLURM_STEP_NODELIST"}
    job, rank, local, processes = _numbers({**values, "SLURM_STEP_NUM_TASKS": tasks})
    counts = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", "1"))
    here = max(_tasks_per_node(counts))
    host = re.sub(r"\[([^-,\]]+)[^\]]*\]", r"\1", environ["SLURM_STEP_NODELIST"]).split(",")[0]
    step = environ.get("SLURM_STEP_ID", "0")
    port = _port(environ, job * 16 + int(step) if step.isdigit() else job * 16)
    address = environ.get("JAX_COORDINATOR_ADDRESS", f"{host}:{port}")
    return Place("SLURM", address, processes, rank, _devices(environ, local, here))


def _cloud_tpu(environ: Mapping[str, str]) -> Place | None:
    """Hosts of a TPU slice, and slices; JAX knows how to join them."""
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    slices = environ.get("MEGASCALE_NUM_SLICES", "1")
    platforms = environ.get("JAX_PLATFORMS") or "tpu"
    if "tpu" not in platforms.split(",") or any(name in environ for name in TPU_TUNED):
        return None
    if hosts is None:
        # importing JAX sets the variable where the machine has no chip
        has_library = importlib.util.find_spec("libtpu") or "TPU_LIBRARY_PATH" in environ
        if not has_library or "TPU_SKIP_MDS_QUERY" in environ:
            return None
        hosts = _metadata("worker-network-endpoints")
        found = re.search(r"MEGASCALE_NUM_SLICES: *'?(\d+)", _metadata("tpu-env") or "")
        slices = environ.get("MEGASCALE_NUM_SLICES", found[1] if found else "1")
    if hosts is None:
        return None
    several = "," in hosts or _numbers({"MEGASCALE_NUM_SLICES": slices}) != [1]
    return Place("Cloud TPU") if several else Place("Cloud TPU", None, 1, 0)


def _kubernetes(environ: Mapping[str, str]) -> Place | None:
    """A pod of an indexed Job, which JAX asks the cluster about."""
    if "KUBERNETES_SERVICE_HOST" not in environ or "JOB_COMPLETION_INDEX" not in environ:
        return None
    if importlib.util.find_spec("kubernetes") is None:
        raise ValueError(
            f"this is pod {environ['JOB_COMPLETION_INDEX']} of an indexed Kubernetes Job, and"
            " nothing says how many there are: set JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES"
            " in the Job, install the package kubernetes, or give --distributed off for pods that"
            " have nothing to do with each other"
        )
    return Place("Kubernetes")


# --- parts of them ------------------------------------------------------------------------------


def _numbers(values: Mapping[str, str]) -> list[int]:
    wrong = [f"{name}={value!r}" for name, value in values.items() if not value.isdigit()]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} in the environment is not a number")
    return [int(value) for value in values.values()]


def _port(environ: Mapping[str, str], seed: int) -> int:
    """The same in all processes of a job, hardly ever in two jobs of a node."""
    given = environ.get("JAX_COORDINATOR_PORT")
    return int(given) if given else 65535 - 2**12 + 1 + seed % 2**12


def _tasks_per_node(value: str) -> list[int]:
    """[2, 2, 1] of `2(x2),1`."""
    found = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", value):
        found += [int(count)] * int(times or 1)
    return found or [1]


def _devices(environ: Mapping[str, str], local: int, here: int) -> tuple[int, ...] | None:
    """Process `local` of the `here` on a node gets its part of the GPUs that all of them see.

    None (all) for the only one of its node, where a launcher has dealt them out already, and where
    there are none.
    """
    seen = _visible_gpus(environ)
    on_node = environ.get("SLURM_GPUS_ON_NODE", "")
    dealt = seen == 1 or (on_node.isdigit() and seen < int(on_node))
    if here == 1 or seen == 0 or dealt or "JAX_LOCAL_DEVICE_IDS" in environ:
        return None
    if seen % here:
        raise ValueError(
            f"{here} processes on this node cannot share its {seen} GPUs evenly: start one"
            " process for all of them, or as many as divide them"
        )
    each = seen // here
    return tuple(range(local * each, (local + 1) * each))


def _visible_gpus(environ: Mapping[str, str]) -> int:
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if name in environ:
            return len([part for part in environ[name].split(",") if part.strip()])
    return len(_device_files())


def _device_files() -> Sequence[Path]:
    return [path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit()]


def _metadata(key: str) -> str | None:
    """An attribute of a Google Cloud machine; None on others."""
    request = urllib.request.Request(METADATA + key, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, TimeoutError):
        return None
