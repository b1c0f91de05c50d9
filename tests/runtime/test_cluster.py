"""Launchers are told by the environment they leave, and one process is left alone."""

import threading
import types

import pytest

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
def machine(monkeypatch):
    """Without GPUs, without libtpu, not on Google Cloud."""
    found = types.SimpleNamespace(gpus=0, modules=(), metadata={})
    monkeypatch.setattr(cluster, "_device_files", lambda: [None] * found.gpus)
    monkeypatch.setattr(cluster, "_metadata", lambda key: found.metadata.get(key))
    spec = types.SimpleNamespace(find_spec=lambda name: name in found.modules or None)
    monkeypatch.setattr(cluster.importlib, "util", spec)
    return found


def test_a_plain_shell_is_no_cluster():
    assert cluster.find({"HOME": "/root", "JAX_COORDINATOR_ADDRESS": "h:1"}) is None


def test_a_step_of_slurm():
    place = cluster.find(SLURM)
    assert (place.launcher, place.processes, place.index) == ("SLURM", 4, 3)
    host, port = place.address.split(":")
    assert host == "gpu007"
    assert 61440 <= int(port) <= 65535
    same = cluster.find({**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert same.address == place.address
    other = cluster.find({**SLURM, "SLURM_STEP_ID": "1"})
    assert other.address != place.address  # two steps of a job do not meet
    given = cluster.find({**SLURM, "JAX_COORDINATOR_PORT": "1234"})
    assert given.address == "gpu007:1234"


@pytest.mark.parametrize(
    ("nodes", "host"), [("a1", "a1"), ("a1,b2", "a1"), ("r[2,4]n[01-03],x", "r2n01")]
)
def test_first_node_of_a_list(nodes, host):
    assert cluster.find({**SLURM, "SLURM_STEP_NODELIST": nodes}).address.startswith(f"{host}:")


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
def test_one_process_waits_for_nobody(environ, monkeypatch):
    def refuse(**arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr(cluster.jax.distributed, "initialize", refuse)
    place = cluster.find(environ)
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
def test_gpus_of_a_process(environ, devices):
    assert cluster.find({**SLURM, **environ}).devices == devices


def test_gpus_that_cannot_be_shared_are_refused(machine):
    machine.gpus = 3
    with pytest.raises(ValueError, match="2 processes on this node cannot share its 3 GPUs"):
        cluster.find(SLURM)


def test_open_mpi():
    place = cluster.find({**SLURM, **MPI})  # inside an allocation
    assert (place.launcher, place.processes, place.index) == ("Open MPI", 4, 2)
    assert place.address.startswith("10.96.0.1:")
    five = {k: v for k, v in MPI.items() if k != "OMPI_MCA_orte_hnp_uri"}
    with pytest.raises(ValueError, match="mpirun -x JAX_COORDINATOR_ADDRESS"):
        cluster.find(five)
    assert cluster.find({**five, "JAX_COORDINATOR_ADDRESS": "h:5"}).address == "h:5"
    one_node = {**five, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-a-17@1"}
    assert cluster.find(one_node).address.startswith("127.0.0.1:")


def test_cloud_tpu(machine):
    assert cluster.find(HOSTS) == cluster.Place("Cloud TPU")
    slices = {**HOSTS, "TPU_WORKER_HOSTNAMES": "w0", "MEGASCALE_NUM_SLICES": "2"}
    assert cluster.find(slices) == cluster.Place("Cloud TPU")
    assert cluster.find({**HOSTS, "JAX_PLATFORMS": "cpu"}) is None
    assert cluster.find({**HOSTS, "TPU_PROCESS_BOUNDS": "1,1,1"}) is None  # shared by hand
    machine.modules = ("libtpu",)
    assert cluster.find({}) is None  # chips, but not in Google's cloud
    machine.metadata = {"worker-network-endpoints": "a:b:10.0.0.2"}
    assert cluster.find({}).processes == 1
    machine.metadata = {"worker-network-endpoints": "a:b:10.0.0.2,a:b:10.0.0.3"}
    assert cluster.find({}) == cluster.Place("Cloud TPU")
    assert cluster.find({"TPU_SKIP_MDS_QUERY": "1"}) is None  # JAX saw no chip


def test_kubernetes(machine):
    with pytest.raises(ValueError, match="pod 1 of an indexed Kubernetes Job"):
        cluster.find(POD)
    given = {**POD, "JAX_COORDINATOR_ADDRESS": "job-0.svc:1234", "JAX_NUM_PROCESSES": "2"}
    assert cluster.find(given) == cluster.Place("JAX_NUM_PROCESSES", "job-0.svc:1234", 2, 1)
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES is 2, but JAX_COORDINATOR_ADDRESS"):
        cluster.find({"JAX_NUM_PROCESSES": "2"})
    machine.modules = ("kubernetes",)
    assert cluster.find(POD) == cluster.Place("Kubernetes")
    assert cluster.find({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None


def test_a_number_that_is_none_is_named():
    with pytest.raises(ValueError, match="SLURM_PROCID='x' in the environment is not a number"):
        cluster.find({**SLURM, "SLURM_PROCID": "x"})


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
