"""The recipes of docs/cluster/ run as they are, with the launchers' commands faked."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from launchers import CLUSTER, Room

from ldm_jax.runtime import checkpoint, cli, flags, rundir
from ldm_jax.train import main
from ldm_jax.train.run import supervisor

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.name for path in CLUSTER.iterdir() if path.suffix in (".sh", ".sbatch"))
NEEDS = {
    "slurm.sbatch": ("VENV", "WORKDIR"),
    "node_gpus.sh": ("VENV", "WORKDIR"),
    "gke_jobset.sh": ("IMAGE", "WORKDIR"),
    "tpu_vm.sh": ("PROJECT", "WORKDIR"),
    "multislice.sh": ("PROJECT", "WORKDIR"),
}


@pytest.fixture
def room(tmp_path):
    return Room(tmp_path)


def slurm(room, *arguments, tasks=2, **variables):
    given = {"VENV": str(room.folder), "WORKDIR": str(room.folder / "runs" / "one")}
    given |= {"SLURM_JOB_ID": "77", "SLURM_NTASKS": str(tasks), **variables}
    return room.run("slurm.sbatch", *arguments, **given)


def parsed(arguments):
    """(workdir, config) that ldm-train makes of its arguments; the supervisor is asked for."""
    restart, rest = flags.parse_known(arguments, "ldm-train", supervisor.Restart)
    assert restart.restart == "on-failure"
    return main.parse(main.load_config(rest[0]), rest[1:], "ldm-train")


# --- all of them ----------------------------------------------------------------------------------


def test_every_recipe_is_known():
    assert sorted(NEEDS) == RECIPES
    text = (ROOT / "docs" / "cluster.md").read_text()
    assert [name for name in (*RECIPES, "Dockerfile") if name not in text] == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_shell_reads_it(recipe):
    found = subprocess.run(["bash", "-n", str(CLUSTER / recipe)], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
    assert recipe.endswith(".sbatch") or os.access(CLUSTER / recipe, os.X_OK)


@pytest.mark.parametrize(
    ("recipe", "missing"), [(r, n) for r, names in NEEDS.items() for n in names]
)
def test_a_variable_that_is_not_set_is_named(room, recipe, missing):
    given = {name: "x" for name in NEEDS[recipe] if name != missing}
    code, said = room.run(recipe, SLURM_JOB_ID="1", SLURM_NTASKS="1", **given)
    assert code != 0
    assert f"{missing}: set {missing} to" in said
    assert not list(room.folder.glob("*.calls"))


@pytest.mark.parametrize("recipe", ["slurm.sbatch", "node_gpus.sh"])
def test_an_environment_without_the_command_is_named(room, recipe):
    variables = {"VENV": "/nowhere", "WORKDIR": "x", "SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"}
    code, said = room.run(recipe, **variables)
    assert (code, "/nowhere/bin/ldm-train: not there" in said) == (1, True)


# --- SLURM ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (cli.INTERRUPTED, True)])
def test_slurm_queues_again_what_was_stopped_and_saved(room, code, again):
    (room.folder / "codes").write_text(f"{code}\n")
    found, _ = slurm(room, tasks=1)
    assert found == code
    assert room.calls("scontrol") == ([["requeue", "77"]] if again else [])
    (call,) = room.calls("ldm-train")
    workdir, config = parsed(call)
    assert workdir == str(room.folder / "runs" / "one")
    assert config.batch_size == 8


def test_slurm_takes_other_arguments_as_they_are(room):
    flags = ["tiny:class", "--first-stage.path", "/with a space/first stage"]
    assert slurm(room, *flags)[0] == 0
    first, second = room.calls("ldm-train")
    assert first == second
    assert first[:3] == flags


def test_slurm_is_told_to_signal_and_requeue():
    text = (CLUSTER / "slurm.sbatch").read_text()
    head = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    options = dict(option.removeprefix("--").partition("=")[::2] for option in head)
    name, seconds = options["signal"].split("@")  # without B: to the step, not to the shell
    assert (name, int(seconds) >= 120) == ("TERM", True)
    assert "requeue" in options
    assert options["open-mode"] == "append"
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"


# --- one node -------------------------------------------------------------------------------------


def test_a_node_in_one_process_or_several(room):
    given = {"VENV": str(room.folder), "WORKDIR": str(room.folder / "run")}
    assert room.run("node_gpus.sh", **given)[0] == 0
    assert room.run("node_gpus.sh", "tiny:vq", PROCESSES="2", PORT="5", **given)[0] == 0
    whole, *parts = room.calls("ldm-train")
    assert "--distributed" not in whole
    parsed(whole)
    joined = sorted(part[part.index("--distributed") + 1] for part in parts)
    assert joined == ["127.0.0.1:5,2,0", "127.0.0.1:5,2,1"]
    assert (room.folder / "devices").read_text().split()[0] == "all"
    assert sorted((room.folder / "devices").read_text().split()[1:]) == ["0", "1"]
    code, said = room.run("node_gpus.sh", PROCESSES="two", **given)
    assert (code, said) == (1, "PROCESSES=two is not a number from 1 on\n")


@pytest.mark.parametrize(("codes", "expected"), [("75\n75\n", 75), ("75\n3\n", 3), ("0\n75\n", 75)])
def test_the_worst_code_of_a_node_is_its_own(room, codes, expected):
    (room.folder / "codes").write_text(codes)
    given = {"VENV": str(room.folder), "WORKDIR": "run", "PROCESSES": "2"}
    assert room.run("node_gpus.sh", **given)[0] == expected


def test_sigterm_reaches_every_process_of_a_node(room):
    room.script("bin/ldm-train", "trap 'exit 75' TERM\ntouch up$CUDA_VISIBLE_DEVICES\n"
                "while true; do sleep 0.05; done\n")  # fmt: skip
    given = {"VENV": str(room.folder), "WORKDIR": "run", "PROCESSES": "2"}
    process = room.start("node_gpus.sh", **given)
    try:
        until = time.monotonic() + 30
        while not all((room.folder / f"up{i}").exists() for i in range(2)):
            assert time.monotonic() < until
            time.sleep(0.02)
        process.terminate()
        assert process.wait(30) == cli.INTERRUPTED
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


# --- GKE ------------------------------------------------------------------------------------------


def jobset(room, *arguments, **variables):
    given = {"IMAGE": "registry/ldm:1", "WORKDIR": "gs://bucket/runs/ldm", **variables}
    code, said = room.run("gke_jobset.sh", *arguments, **given)
    assert code == 0, said
    assert room.calls("kubectl")[-1] == ["apply", "-f", "-"]
    return yaml.safe_load((room.folder / "stdin").read_text())


def test_gke_one_slice(room):
    made = jobset(room)
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    network = {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    assert made["spec"]["network"] == network  # the headless service
    (group,) = made["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert (group["replicas"], job["parallelism"], job["completions"]) == (1, 4, 4)
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert container["image"] == "registry/ldm:1"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["env"] == [
        {"name": "JAX_COMPILATION_CACHE_DIR", "value": "gs://bucket/runs/xla_cache"}
    ]
    assert container["command"] == ["ldm-train"]
    workdir, config = parsed(container["args"])
    assert (workdir, config.batch_size) == ("gs://bucket/runs/ldm", 8 * 16)
    assert config.mesh.dcn_data == 1

    # what was stopped and saved, and what lost its node, does not count among the restarts
    rules = job["podFailurePolicy"]["rules"]
    assert {rule["action"] for rule in rules} == {"FailJob"}
    assert rules[0]["onExitCodes"]["values"] == [cli.INTERRUPTED]
    assert rules[0]["onExitCodes"]["containerName"] == container["name"]
    policy = made["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 10
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_gke_several_slices_and_any_argument(room):
    path = 'it\'s a "path", with: all'
    flags = ["tiny:class", "--first-stage.path", path, "--batch-size", "64"]
    pools = {"SLICES": "3", "TOPOLOGY": "2x2x4", "ACCELERATOR": "tpu-v5p-slice"}
    made = jobset(room, *flags, **pools)
    (group,) = made["spec"]["replicatedJobs"]
    assert (group["replicas"], group["template"]["spec"]["parallelism"]) == (3, 4)
    (container,) = group["template"]["spec"]["template"]["spec"]["containers"]
    _, config = parsed(container["args"])
    assert (config.first_stage.path, config.mesh.dcn_data) == (path, 3)
    given = {"IMAGE": "i", "WORKDIR": "gs://b/r", "TOPOLOGY": "2x3", "CHIPS_PER_HOST": "4"}
    code, said = room.run("gke_jobset.sh", **given)
    assert (code, said) == (1, "TOPOLOGY=2x3 has 6 chips, no multiple of CHIPS_PER_HOST=4\n")


# --- Cloud TPU VMs --------------------------------------------------------------------------------


def cloud(room, recipe, *arguments, **variables):
    given = {"PROJECT": "project", "WORKDIR": "gs://bucket/runs/ldm", "POLL": "0.1"}
    return room.run(recipe, *arguments, **{**given, "PACKAGE": "ldm.whl", **variables})


def verbs(room):
    """What gcloud was asked to do, without what it was asked."""
    return [call[3] for call in room.calls("gcloud") if call[3] not in ("describe", "ssh")]


def test_tpu_vm_is_made_and_trains_on_every_host(room):
    flags = ["tiny:class", "--first-stage.path", "gs://b/it's first $stage", "--batch-size", "64"]
    code, said = cloud(room, "tpu_vm.sh", *flags, SPOT="1")
    assert code == 0, said
    assert said.splitlines()[-1].endswith("tpu-vm delete ldm --project project --zone us-west4-a")
    (create,) = (call for call in room.calls("gcloud") if call[3] == "create")
    assert shlex.join(create[3:]) == (
        "create ldm --project project --zone us-west4-a --accelerator-type v5litepod-16"
        " --version v2-alpha-tpuv5-lite --spot"
    )
    calls = room.calls("ldm-train")
    assert len(calls) == 2  # a slice here has two hosts
    assert calls[0] == calls[1]
    workdir, config = parsed(calls[0])
    assert (workdir, config.first_stage.path) == ("gs://bucket/runs/ldm", flags[2])
    installed = (room.folder / "uv.calls").read_text().splitlines()
    assert len(installed) == 4
    assert sum(line.endswith("bin/python jax[tpu] gcsfs ldm.whl") for line in installed) == 2


def test_tpu_vm_goes_on_after_a_stop_and_a_preemption(room):
    (room.folder / "state").write_text("PREEMPTED")
    (room.folder / "codes").write_text("75\n75\n")
    room.script("bin/python3", '[ -e "$8/pyproject.toml" ] && touch "$7/ldm_jax-1.whl"\n')
    code, said = cloud(room, "tpu_vm.sh", PACKAGE="")
    assert code == 0, said
    assert verbs(room) == ["delete", "create", "scp"]
    (copy,) = (call for call in room.calls("gcloud") if call[3] == "scp")
    assert (copy[4].endswith("/ldm_jax-1.whl"), copy[5], copy[-1]) == (True, "ldm:", "--worker=all")
    assert len(room.calls("ldm-train")) == 4
    assert parsed(room.calls("ldm-train")[0])[1].batch_size == 8 * 16


def test_tpu_vm_ends_with_the_code_of_a_training_that_gave_up(room):
    (room.folder / "state").write_text("READY")
    (room.folder / "codes").write_text("1\n1\n")
    assert cloud(room, "tpu_vm.sh")[0] == 1
    assert verbs(room) == []


def test_multislice_asks_for_all_slices_and_starts_on_all(room):
    (room.folder / "state").write_text("SUSPENDED")
    code, said = cloud(room, "multislice.sh")
    assert code == 0, said
    assert verbs(room) == ["delete", "create"]
    (create,) = (call for call in room.calls("gcloud") if call[3] == "create")
    assert shlex.join(create[2:]) == (
        "queued-resources create ldm --project project --zone us-west4-a --node-count 2"
        " --node-prefix ldm --accelerator-type v5litepod-16 --runtime-version v2-alpha-tpuv5-lite"
    )
    assert len(room.calls("ldm-train")) == 4  # a slice here has two hosts
    _, config = parsed(room.calls("ldm-train")[0])
    assert (config.mesh.dcn_data, config.batch_size) == (2, 8 * 2 * 16)
    assert sorted(p.name for p in (room.folder / "hosts").iterdir()) == ["ldm-0", "ldm-1"]


# --- real processes -------------------------------------------------------------------------------


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.mark.slow
def test_real_processes_find_each_other_and_the_run_moves_on(room):
    """Two steps as SLURM starts them, two more as two processes of one node, all in one run."""
    room.script("bin/ldm-train", f'exec {sys.executable} -m ldm_jax.train.main "$@"\n')
    flags = [
        "tiny:first_stage",
        "--batch-size",
        "8",
        "--intervals.save",
        "2",
        "--restart-delay",
        "0",
    ]
    shared = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
    }
    run = room.folder / "runs" / "one"
    code, said = slurm(
        room, *flags, "--steps", "2", JAX_COORDINATOR_PORT=free_port(), **shared
    )  # fmt: skip
    assert code == 0, said
    given = {"VENV": str(room.folder), "WORKDIR": str(run), "PROCESSES": "2", "PORT": free_port()}
    code, said = room.run("node_gpus.sh", *flags, "--steps", "4", **given, **shared)
    assert code == 0, said
    assert checkpoint.saved_steps(run) == [2, 4]
    for step in ("2", "4"):
        meta = checkpoint.read_meta(rundir.epath.Path(run) / "checkpoints" / step)
        assert (meta["processes"], meta["mesh"]["data"]) == (2, 4)
    assert len(rundir.read_metrics(run)) == 4
