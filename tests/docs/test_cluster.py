"""The recipes of docs/cluster/ run as they are, with the launchers' commands faked."""

import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import yaml
from launchers import CLUSTER, Room

from ldm_jax import schema, sharding
from ldm_jax.runtime import checkpoint, cli, flags, rundir
from ldm_jax.train import main
from ldm_jax.train.run import supervisor

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.name for path in CLUSTER.iterdir() if path.suffix in (".sh", ".sbatch"))
# a recipe's own arguments, with what a shell could take apart
FLAGS = ["tiny:class", "--first-stage.path", 'gs://b/it\'s "first": $stage', "--batch-size", "64"]


@pytest.fixture
def room(tmp_path):
    return Room(tmp_path)


def run(room, recipe, *arguments, **variables):
    """(exit code, what was said) of a recipe that has what it needs."""
    given = {"VENV": str(room.folder), "WORKDIR": str(room.folder / "runs" / "one"), "IMAGE": "i:1"}
    given |= {"PROJECT": "project", "POLL": "0.1", "PACKAGE": "ldm.whl", "SLURM_JOB_ID": "77"}
    return room.run(recipe, *arguments, **{**given, "SLURM_NTASKS": "2", **variables})


def parsed(arguments):
    """(workdir, config) that ldm-train makes of its arguments; the supervisor is asked for."""
    restart, rest = flags.parse_known(arguments, "ldm-train", supervisor.Restart)
    assert restart.restart == "on-failure"
    return main.parse(main.load_config(rest[0]), rest[1:], "ldm-train")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_documented_and_names_what_it_lacks(room, recipe):
    assert recipe in (ROOT / "docs" / "cluster.md").read_text()
    assert recipe.endswith(".sbatch") or os.access(CLUSTER / recipe, os.X_OK)
    needs = (
        {"slurm": "VENV", "node_gpus": "VENV", "gke_jobset": "IMAGE"}.get(
            Path(recipe).stem, "PROJECT"
        ),
        "WORKDIR",
    )
    for missing in needs:
        given = {name: "x" for name in needs if name != missing}
        code, said = room.run(recipe, SLURM_JOB_ID="1", SLURM_NTASKS="1", **given)
        assert (code != 0, f"{missing}: set {missing} to" in said) == (True, True)
    if "VENV" in needs:
        code, said = run(room, recipe, VENV="/nowhere")
        assert (code, "/nowhere/bin/ldm-train: not there" in said) == (1, True)
    assert not list(room.folder.glob("*.calls"))


def test_the_examples_of_the_page_fit_their_devices():
    """Arguments are read, meshes and batches fit, and no path that the config needs is missing."""
    page = (ROOT / "docs" / "cluster.md").read_text().replace("\\\n", " ")
    commands = dict(re.findall(r"docs/cluster/([\w.]+) +(\w+ --.*)", page))
    added = {"slurm.sbatch": [], "gke_jobset.sh": ["--mesh.dcn-data", "4"]}
    size = {"slurm.sbatch": (16, 1), "gke_jobset.sh": (64, 4)}  # devices, slices
    for recipe, arguments in commands.items():
        argv = [*arguments.split(), "--workdir", "x", "--restart", "on-failure", *added[recipe]]
        _, config = parsed(argv)
        inner, outer = sharding.mesh_sizes(config.mesh, *size[recipe])
        assert config.batch_size % (inner[0] * outer[0] * inner[1] * outer[1]) == 0
        assert config.first_stage.path
        text = schema.text_of(config.cond)
        assert text is None or text.trainable or text.path
        source = config.data.source
        assert getattr(source, "path", None) or getattr(source, "data_dir", None)
    assert commands.keys() == size.keys()


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (cli.INTERRUPTED, True)])
def test_slurm_queues_again_what_was_stopped_and_saved(room, code, again):
    (room.folder / "codes").write_text(f"{code}\n")
    assert run(room, "slurm.sbatch", SLURM_NTASKS="1")[0] == code
    assert room.calls("scontrol") == ([["requeue", "77"]] if again else [])
    workdir, config = parsed(*room.calls("ldm-train"))
    assert (workdir, config.batch_size) == (str(room.folder / "runs" / "one"), 8)


def test_slurm_starts_the_same_everywhere_and_is_told_to_signal(room):
    assert run(room, "slurm.sbatch", *FLAGS)[0] == 0
    first, second = room.calls("ldm-train")
    assert first == second
    assert first[: len(FLAGS)] == FLAGS
    text = (CLUSTER / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.M))
    name, seconds = options["signal"].split("@")  # without B: to the step, not to the shell
    assert (name, int(seconds) >= 120) == ("TERM", True)
    assert ("requeue" in options, options["open-mode"]) == (True, "append")
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"


@pytest.mark.parametrize(
    ("codes", "worst"), [("75 75", 75), ("75 3", 3), ("3 75", 3), ("0 75", 75)]
)
def test_the_worst_code_of_a_node_is_its_own(room, codes, worst):
    room.script("bin/ldm-train", f"codes=({codes})\nexit ${{codes[CUDA_VISIBLE_DEVICES]}}\n")
    assert run(room, "node_gpus.sh", PROCESSES="2")[0] == worst


def test_a_node_in_one_process_or_several(room):
    assert run(room, "node_gpus.sh")[0] == 0
    assert run(room, "node_gpus.sh", *FLAGS, PROCESSES="2", PORT="5")[0] == 0
    whole, *parts = room.calls("ldm-train")
    assert "--distributed" not in whole
    parsed(whole)
    joined = sorted(part[part.index("--distributed") + 1] for part in parts)
    assert joined == ["127.0.0.1:5,2,0", "127.0.0.1:5,2,1"]
    first, *others = (room.folder / "devices").read_text().split()
    assert (first, sorted(others)) == ("all", ["0", "1"])
    said = "PROCESSES=two is not a number from 1 on\n"
    assert run(room, "node_gpus.sh", PROCESSES="two") == (1, said)
    said = "TOPOLOGY=2x3 has 6 chips, no multiple of CHIPS_PER_HOST=4\n"
    assert run(room, "gke_jobset.sh", TOPOLOGY="2x3", CHIPS_PER_HOST="4") == (1, said)


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


@pytest.mark.parametrize("slices", [1, 3])
def test_a_jobset_of_gke(room, slices):
    given = {"WORKDIR": "gs://bucket/runs/ldm"}
    if slices > 1:
        given |= {"SLICES": "3", "TOPOLOGY": "2x2x4", "ACCELERATOR": "tpu-v5p-slice"}
    code, said = run(room, "gke_jobset.sh", *(FLAGS if slices > 1 else []), **given)
    assert code == 0, said
    assert room.calls("kubectl") == [["apply", "-f", "-"]]
    made = yaml.safe_load((room.folder / "stdin").read_text())
    assert set(made["spec"]["network"].values()) == {True}  # the headless service
    (group,) = made["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (group["replicas"], job["parallelism"], job["completions"]) == (slices, 4, 4)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": given.get("ACCELERATOR", "tpu-v5-lite-podslice"),
        "cloud.google.com/gke-tpu-topology": given.get("TOPOLOGY", "4x4"),
    }
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["env"][0]["value"] == "gs://bucket/runs/xla_cache"
    workdir, config = parsed(container["args"])
    assert (workdir, config.mesh.dcn_data) == ("gs://bucket/runs/ldm", slices)
    assert config.batch_size == (8 * 16 if slices == 1 else 64)
    assert slices == 1 or config.first_stage.path == FLAGS[2]
    # what was stopped and saved, and what lost its node, does not count among the restarts
    assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0)
    rules = job["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["FailJob", "FailJob"]
    codes = {"containerName": container["name"], "operator": "In", "values": [cli.INTERRUPTED]}
    assert rules[0]["onExitCodes"] == codes
    (rule,) = made["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def asked(room):
    """What gcloud was asked to do, beside looking and running commands."""
    return [call[3:] for call in room.calls("gcloud") if call[3] not in ("describe", "ssh")]


def test_tpu_vm_is_made_and_trains_on_every_host(room):
    code, said = run(room, "tpu_vm.sh", *FLAGS, SPOT="1")
    assert code == 0, said
    assert said.splitlines()[-1].endswith("tpu-vm delete ldm --project project --zone us-west4-a")
    (create,) = asked(room)
    assert create[:2] == ["create", "ldm"]
    assert {"v5litepod-16", "v2-alpha-tpuv5-lite", "--spot"} < set(create)
    calls = room.calls("ldm-train")
    assert len(calls) == 2  # a slice here has two hosts
    assert calls[0] == calls[1]
    assert parsed(calls[0])[1].first_stage.path == FLAGS[2]
    installed = (room.folder / "uv.calls").read_text().splitlines()
    assert sum(line.endswith("bin/python jax[tpu] gcsfs ldm.whl") for line in installed) == 2


def test_tpu_vm_goes_on_after_a_stop_and_a_preemption(room):
    (room.folder / "state").write_text("PREEMPTED")
    (room.folder / "codes").write_text("75\n75\n")
    room.script("bin/python3", '[ -e "$8/pyproject.toml" ] && touch "$7/ldm_jax-1.whl"\n')
    code, said = run(room, "tpu_vm.sh", PACKAGE="")
    assert code == 0, said
    (_, _, copy) = verbs = asked(room)
    assert [call[0] for call in verbs] == ["delete", "create", "scp"]
    assert (copy[1].endswith("/ldm_jax-1.whl"), copy[2], copy[-1]) == (True, "ldm:", "--worker=all")
    assert len(room.calls("ldm-train")) == 4
    assert parsed(room.calls("ldm-train")[0])[1].batch_size == 8 * 16


def test_tpu_vm_ends_with_the_code_of_a_training_that_gave_up(room):
    (room.folder / "state").write_text("READY")
    (room.folder / "codes").write_text("1\n1\n")
    assert run(room, "tpu_vm.sh")[0] == 1
    assert asked(room) == []


def test_multislice_asks_for_all_slices_and_starts_on_all(room):
    (room.folder / "state").write_text("SUSPENDED")
    code, said = run(room, "multislice.sh")
    assert code == 0, said
    delete, create = asked(room)
    assert (delete[0], create[:2]) == ("delete", ["create", "ldm"])
    for option, value in (("--node-count", "2"), ("--node-prefix", "ldm")):
        assert create[create.index(option) + 1] == value
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
    flags = "tiny:first_stage --batch-size 8 --intervals.save 2 --restart-delay 0"
    shared = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(ROOT)}
    workdir = room.folder / "runs" / "one"
    more = {"JAX_COORDINATOR_PORT": free_port(), **shared}
    code, said = run(room, "slurm.sbatch", *flags.split(), "--steps", "2", **more)
    assert code == 0, said
    more = {"PROCESSES": "2", "PORT": free_port(), **shared}
    code, said = run(room, "node_gpus.sh", *flags.split(), "--steps", "4", **more)
    assert code == 0, said
    assert checkpoint.saved_steps(workdir) == [2, 4]
    for step in ("2", "4"):
        meta = checkpoint.read_meta(rundir.epath.Path(workdir) / "checkpoints" / step)
        assert (meta["processes"], meta["mesh"]["data"]) == (2, 4)
    assert len(rundir.read_metrics(workdir)) == 4
