"""Launchers are told by the environment they leave, and one process is left alone."""

import importlib.util
import os
import sys
import threading
import types

import pytest
import requests
from jax._src.clusters import cloud_tpu_cluster
from launchers import OWN

from ldm_jax.runtime import cluster

SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_NODELIST": "gpu[007-008,011]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
HOSTS = {"TPU_WORKER_HOSTNAMES": "w0,w1", "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "true"}


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """Without TPU chips, without GPUs, without the package kubernetes, not on Google Cloud."""
    found = types.SimpleNamespace(chips=0, devices=tmp_path, modules=(), metadata=None)

    def get_metadata(key):
        if found.metadata is None:
            raise requests.ConnectionError
        return found.metadata.get(key, ""), 200 if key in found.metadata else 404

    monkeypatch.setattr(cluster, "DEVICES", tmp_path)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", get_metadata)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in found.modules or None)
    return found


@pytest.fixture
def find(machine, monkeypatch):
    """`cluster.find` where these variables are all that a launcher has set."""

    def found(environ):
        with monkeypatch.context() as patch:
            for name in [n for n in os.environ if n.startswith((*OWN, "CUDA_", "ROCR_", "HIP_"))]:
                patch.delenv(name)
            patch.delenv("JAX_PLATFORMS", raising=False)
            skip = {} if machine.chips else {"TPU_SKIP_MDS_QUERY": "1"}  # as importing JAX sets it
            for name, value in {**skip, **environ}.items():
                patch.setenv(name, value)
            return cluster.find()

    return found


def test_a_plain_shell_is_no_cluster(find):
    assert find({"HOME": "/root", "JAX_COORDINATOR_ADDRESS": "h:1"}) is None


def test_a_step_of_slurm(find):
    place = find(SLURM)
    assert (place.launcher, place.processes, place.index) == ("SLURM", 4, 3)
    host, port = place.address.split(":")
    assert host == "gpu007"
    assert 61440 <= int(port) <= 65535
    same = find({**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert same.address == place.address
    other = find({**SLURM, "SLURM_STEP_ID": "1"})
    assert other.address != place.address  # two steps of a job do not meet
    given = find({**SLURM, "JAX_COORDINATOR_PORT": "1234"})
    assert given.address == "gpu007:1234"


@pytest.mark.parametrize(
    ("nodes", "host"), [("a1", "a1"), ("a1,b2", "a1"), ("r[2,4]n[01-03],x", "r2n01")]
)
def test_first_node_of_a_list(find, nodes, host):
    assert find({**SLURM, "SLURM_STEP_NODELIST": nodes}).address.startswith(f"{host}:")


@pytest.mark.parametrize(
    "environ",
    [
        # an allocation's shell or a batch script: no step
        {k: v for k, v in SLURM.items() if not k.startswith("SLURM_STEP")} | {"SLURM_NTASKS": "4"},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
        {**HOSTS, "TPU_WORKER_HOSTNAMES": "localhost"},
        {**MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
    ],
    ids=["allocation", "interactive step", "one TPU host", "mpirun -n 1"],
)
def test_one_process_waits_for_nobody(find, environ, monkeypatch):
    def refuse(**arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr(cluster.jax.distributed, "initialize", refuse)
    place = find(environ)
    if place is not None:
        cluster.join(place)


@pytest.mark.parametrize(
    ("environ", "devices"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (2, 3)),  # the second of two on the node
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "4"}, None),  # dealt out by SLURM
        ({"CUDA_VISIBLE_DEVICES": "1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "JAX_LOCAL_DEVICE_IDS": "1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, None),
        ({}, None),
    ],
)
def test_gpus_of_a_process(find, environ, devices):
    assert find({**SLURM, **environ}).devices == devices


def test_gpus_that_cannot_be_shared_are_refused(find, machine):
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl"):
        (machine.devices / name).touch()
    with pytest.raises(ValueError, match="2 processes on this node cannot share its 3 GPUs"):
        find(SLURM)


def test_open_mpi(find):
    place = find({**SLURM, **MPI})  # inside an allocation
    assert (place.launcher, place.processes, place.index) == ("Open MPI", 4, 2)
    assert place.address.startswith("10.96.0.1:")
    five = {k: v for k, v in MPI.items() if k != "OMPI_MCA_orte_hnp_uri"}
    with pytest.raises(ValueError, match="mpirun -x JAX_COORDINATOR_ADDRESS"):
        find(five)
    assert find({**five, "JAX_COORDINATOR_ADDRESS": "h:5"}).address == "h:5"
    one_node = {**five, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-a-17@1"}
    assert find(one_node).address.startswith("127.0.0.1:")


def test_cloud_tpu(find, machine):
    assert find(HOSTS) == cluster.Place("Cloud TPU")
    slices = {**HOSTS, "TPU_WORKER_HOSTNAMES": "w0", "MEGASCALE_NUM_SLICES": "2"}
    assert find(slices) == cluster.Place("Cloud TPU")
    assert find({**HOSTS, "JAX_PLATFORMS": "cpu"}) is None
    assert find({**HOSTS, "TPU_PROCESS_BOUNDS": "1,1,1"}) is None  # shared by hand
    machine.chips = 4
    assert find({}) is None  # chips, but not in Google's cloud
    machine.metadata = {}
    assert find({}) is None  # a machine of Google's cloud that is no TPU VM
    machine.metadata = {"agent-worker-number": "0", "worker-network-endpoints": "a:b:10.0.0.2"}
    assert find({}) == cluster.Place("Cloud TPU", None, 1, 0)
    machine.metadata["tpu-env"] = "MEGASCALE_NUM_SLICES: '2'"
    assert find({}) == cluster.Place("Cloud TPU")
    machine.metadata = {
        "agent-worker-number": "0",
        "worker-network-endpoints": "a:b:10.0.0.2,a:b:10.0.0.3",
    }
    assert find({}) == cluster.Place("Cloud TPU")
    assert find({"TPU_SKIP_MDS_QUERY": "1"}) is None  # JAX saw no chip


def test_a_jax_that_reads_launchers_elsewhere_is_named(find, machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax._src.clusters", types.ModuleType("clusters"))
    complaint = r"has no jax\._src\.clusters\.{}, which says .*--distributed off"
    with pytest.raises(ValueError, match=complaint.format("OmpiCluster")):
        find(MPI)
    assert find({**MPI, "JAX_COORDINATOR_ADDRESS": "h:1"}).address == "h:1"
    assert find(SLURM).processes == 4
    machine.chips = 4
    with pytest.raises(ValueError, match=complaint.format("GceTpuCluster")):
        find({})
    assert find(HOSTS) == cluster.Place("Cloud TPU")


def test_kubernetes(find, machine):
    with pytest.raises(ValueError, match="pod 1 of an indexed Kubernetes Job"):
        find(POD)
    given = {**POD, "JAX_COORDINATOR_ADDRESS": "job-0.svc:1234", "JAX_NUM_PROCESSES": "2"}
    assert find(given) == cluster.Place("JAX_NUM_PROCESSES", "job-0.svc:1234", 2, 1)
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES is 2, but JAX_COORDINATOR_ADDRESS"):
        find({"JAX_NUM_PROCESSES": "2"})
    machine.modules = ("kubernetes",)
    assert find(POD) == cluster.Place("Kubernetes")
    assert find({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None


def test_a_number_that_is_none_is_named(find):
    with pytest.raises(ValueError, match="SLURM_PROCID='x' in the environment is not a number"):
        find({**SLURM, "SLURM_PROCID": "x"})


def test_others_that_do_not_come_are_an_error_with_a_remedy(monkeypatch, capsys):
    def fail(**arguments):
        assert arguments["local_device_ids"] == (0, 1)
        assert arguments["cluster_detection_method"] == "deactivate"
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out\nmore")

    monkeypatch.setattr(cluster.jax.distributed, "initialize", fail)
    with pytest.raises(RuntimeError, match=r"could not join the others at h:1 .DEADLINE.*--dist"):
        cluster.join(cluster.Place("SLURM", "h:1", 2, 0, (0, 1)))
    assert "SLURM: process 0 of 2 waits for the others at h:1" in capsys.readouterr().err


def test_a_process_that_waits_in_vain_says_so_and_ends(monkeypatch, capsys):
    ended = threading.Event()
    codes = []
    monkeypatch.setattr(cluster, "SECONDS", 0.01)
    monkeypatch.setattr(cluster.os, "_exit", lambda code: (codes.append(code), ended.set()))
    monkeypatch.setattr(cluster.jax.distributed, "initialize", lambda **_: ended.wait(30))
    cluster.join(cluster.Place("SLURM", "h:1", 2, 1))
    assert codes == [1]
    said = capsys.readouterr().err
    assert "SLURM: error: process 1 of 2 has waited 0.01 s for the others at h:1: start" in said
