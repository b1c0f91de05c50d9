"""Find the index and number of this job's processes, and join them through `jax.distributed`.

JAX reads Cloud TPU, Kubernetes and the address of Open MPI 4 by itself (`jax._src.clusters`). This
adds: --distributed and JAX_NUM_PROCESSES; a single process does not wait; a step of SLURM has its
own count, port and node list; Open MPI 5 needs no mpi4py; processes share a node's GPUs evenly;
errors name the variable and the remedy. docs/runs.md lists every launcher's variables.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import jax

SECONDS = 300  # that a process waits for the others
ADDRESS = "JAX_COORDINATOR_ADDRESS"
DEVICES = Path("/dev")
TPU_TUNED = ("TPU_PROCESS_BOUNDS", "TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES")
SAY_IT = "give --distributed ADDRESS:PORT,PROCESSES,INDEX or --distributed off"
REMEDY = (
    f"start the same command in every process, check that the address can be reached, or {SAY_IT}"
)


@dataclasses.dataclass(frozen=True)
class Place:
    """One process of several."""

    launcher: str
    address: str | None = None  # HOST:PORT of process 0; None: JAX detects the rest itself
    processes: int | None = None
    index: int | None = None
    devices: tuple[int, ...] | None = None  # this process's of the node; None: all that it sees


def find() -> Place | None:
    """The place that a launcher gave to this process, perhaps as the only one; None without one.

    ValueError where a launcher started several but does not say enough to join them.
    """
    launchers = (_given, _cloud_tpu, _open_mpi, _slurm, _kubernetes)
    return next(filter(None, (read() for read in launchers)), None)


def parse(value: str) -> Place:
    """`ADDRESS:PORT,PROCESSES,INDEX`. ValueError for anything else."""
    match = re.fullmatch(r"([^,]*:[^,]*),(\d+),(\d+)", value)
    if not match:
        raise ValueError(f"--distributed {value!r} is not ADDRESS:PORT,PROCESSES,INDEX, nor off")
    processes, index = int(match[2]), int(match[3])
    if index >= processes:
        raise ValueError(
            f"--distributed {value!r}: INDEX counts from 0, so the last of {processes} processes"
            f" is {processes - 1}"
        )
    return Place("--distributed", match[1], processes, index)


def join(place: Place) -> None:
    """Starts jax.distributed and waits for the others; nothing for one process.

    RuntimeError if they cannot be joined. If they do not come within SECONDS, logs that and exits.
    """
    if place.processes == 1:
        return
    who = f"process {place.index} of {place.processes}" if place.processes else "this process"
    others = f"the others at {place.address}" if place.address else "the others"
    if not place.index:
        limit = f"up to {SECONDS} s; --distributed off runs alone"
        sys.stderr.write(f"{place.launcher}: {who} waits for {others} ({limit})\n")

    def give_up() -> None:  # JAX would abort with a page of text instead
        why = f"{who} has waited {SECONDS} s for {others}"
        sys.stderr.write(f"{place.launcher}: error: {why}: {REMEDY}\n")
        sys.stderr.flush()
        os._exit(1)

    known = {
        "coordinator_address": place.address,
        "num_processes": place.processes,
        "process_id": place.index,
        "local_device_ids": place.devices,
        "cluster_detection_method": "deactivate",  # or JAX takes one device where it knows SLURM
    }
    timer = threading.Timer(SECONDS, give_up)
    timer.start()
    try:
        jax.distributed.initialize(
            **(known if place.address else {}), initialization_timeout=SECONDS + 60
        )
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise RuntimeError(
            f"{place.launcher}: {who} could not join {others} ({why[:200]}): {REMEDY}"
        ) from error
    finally:
        timer.cancel()


# --- launchers ----------------------------------------------------------------------------------


def _given() -> Place | None:
    """JAX's own variables, set by the user or a job template, for any launcher."""
    processes, address = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get(ADDRESS)
    if processes is None:
        return None  # the address alone may be meant for a launcher below
    numbers = _numbers("JAX_NUM_PROCESSES", "JAX_PROCESS_ID|JOB_COMPLETION_INDEX")
    if not address or numbers is None:
        raise ValueError(
            f"JAX_NUM_PROCESSES is {processes}, but JAX_COORDINATOR_ADDRESS (HOST:PORT of process"
            " 0) or JAX_PROCESS_ID (or JOB_COMPLETION_INDEX) is not set: set all three or none"
        )
    return Place("JAX_NUM_PROCESSES", address, *numbers)


def _cloud_tpu() -> Place | None:
    """Hosts of a TPU slice, and slices; JAX knows how to join them."""
    platforms = os.environ.get("JAX_PLATFORMS") or "tpu"
    if "tpu" not in platforms.split(",") or any(name in os.environ for name in TPU_TUNED):
        return None
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES"))
    if hosts is None:
        count = _tpu_vm_processes()
    elif "," in hosts or _numbers("MEGASCALE_NUM_SLICES") not in (None, [1]):  # GKE
        count = None  # JAX counts them
    else:
        count = 1
    return {0: None, 1: Place("Cloud TPU", None, 1, 0)}.get(count, Place("Cloud TPU"))


def _tpu_vm_processes() -> int:
    """Processes on the slices of a TPU VM, whose metadata JAX reads; 0 elsewhere."""
    if "TPU_SKIP_MDS_QUERY" in os.environ:  # importing JAX sets it where the machine has no chip
        return 0
    tpu_vm = _jax_cluster("GceTpuCluster")
    with contextlib.suppress(OSError):  # chips, but no metadata: not in Google's cloud
        return tpu_vm.get_process_count() if tpu_vm.is_env_present() else 0
    return 0


def _open_mpi() -> Place | None:
    """`mpirun`: JAX reads the address that version 4 sets; version 5 sets none."""
    names = ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")
    numbers = _numbers(*(f"OMPI_COMM_WORLD_{name}" for name in names))
    if numbers is None:
        return None
    size, rank, here, local = numbers
    address, uri = os.environ.get(ADDRESS), os.environ.get("OMPI_MCA_orte_hnp_uri")  # noqa: SIM112
    if address is None and here == size:
        job = uri or os.environ.get("PMIX_NAMESPACE", "")
        address = f"127.0.0.1:{_port(zlib.crc32(job.encode()))}"
    elif address is None and uri:
        port = os.environ.get("JAX_COORDINATOR_PORT")
        address = _jax_cluster("OmpiCluster").get_coordinator_address(SECONDS, port)
    elif address is None:
        raise ValueError(
            "Open MPI 5 does not say where process 0 runs: give it with mpirun -x"
            " JAX_COORDINATOR_ADDRESS=HOST:PORT"
        )
    return Place("Open MPI", address, size, rank, _devices(local, here))


def _slurm() -> Place | None:
    """A step of `srun`.

    A shell or batch script of an allocation has no list of the step's nodes, or a step of one task;
    SLURM_NTASKS, which JAX reads, is that of the allocation there.
    """
    tasks = "SLURM_STEP_NUM_TASKS|SLURM_NTASKS"
    numbers = _numbers("SLURM_JOB_ID", tasks, "SLURM_PROCID", "SLURM_LOCALID")
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if numbers is None or nodes is None:
        return None
    job, processes, rank, local = numbers
    counts = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE", ""))
    here = max(map(int, re.findall(r"(?:^|,)(\d+)", counts)), default=1)  # 2 of 2(x3),1
    host = re.sub(r"\[([^-,\]]+)[^\]]*\]", r"\1", nodes).split(",")[0]  # r2n01 of r[2,4]n[01-03]
    port = _port(job * 16 + (_numbers("SLURM_STEP_ID") or [0])[0])
    address = os.environ.get(ADDRESS, f"{host}:{port}")
    return Place("SLURM", address, processes, rank, _devices(local, here))


def _kubernetes() -> Place | None:
    """A pod of an indexed Job, which JAX asks the cluster about."""
    pod = os.environ.get("JOB_COMPLETION_INDEX")
    if "KUBERNETES_SERVICE_HOST" not in os.environ or pod is None:
        return None
    if importlib.util.find_spec("kubernetes") is None:
        raise ValueError(
            f"this is pod {pod} of an indexed Kubernetes Job, and nothing says how many there are:"
            " set JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES in the Job, install the package"
            " kubernetes, or give --distributed off for pods that are independent of each other"
        )
    return Place("Kubernetes")


# --- parts of them ------------------------------------------------------------------------------


def _jax_cluster(name: str) -> Any:
    """JAX's reader of a launcher. It is private (jax 0.10 to 0.12 have it): reached here alone."""
    try:
        return getattr(importlib.import_module("jax._src.clusters"), name)
    except (ImportError, AttributeError):
        raise ValueError(
            f"jax {jax.__version__} has no jax._src.clusters.{name}, which says which process this"
            f" is: {SAY_IT}"
        ) from None


def _numbers(*names: str) -> list[int] | None:
    """Values of the variables; `A|B` is the first of both that is set. None if one is missing."""
    variables = [next((n for n in name.split("|") if n in os.environ), None) for name in names]
    if None in variables:
        return None
    wrong = [f"{name}={os.environ[name]!r}" for name in variables if not os.environ[name].isdigit()]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} in the environment is not a number")
    return [int(os.environ[name]) for name in variables]


def _port(seed: int) -> int:
    """A port that all processes of a job compute alike, and two jobs of a node hardly ever."""
    given = os.environ.get("JAX_COORDINATOR_PORT")
    return int(given) if given else 65535 - 2**12 + 1 + seed % 2**12


def _devices(local: int, here: int) -> tuple[int, ...] | None:
    """The share of process `local` in the GPUs that all `here` processes of a node see.

    None (all) for the only process of its node, where a launcher has dealt them out already, and
    where there are none. JAX by itself would take one GPU.
    """
    names = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
    listed = next((os.environ[name] for name in names if name in os.environ), None)
    files = DEVICES.glob("nvidia[0-9]*")
    seen = len(list(files) if listed is None else re.findall(r"[^,\s]+", listed))
    on_node = os.environ.get("SLURM_GPUS_ON_NODE", "")
    dealt = seen == 1 or (on_node.isdigit() and seen < int(on_node))
    if here == 1 or seen == 0 or dealt or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    if seen % here:
        raise ValueError(
            f"{here} processes on this node cannot share its {seen} GPUs evenly: start one"
            " process for all of them, or as many as divide them"
        )
    each = seen // here
    return tuple(range(local * each, (local + 1) * each))
