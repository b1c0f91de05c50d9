"""Fake commands of launchers, on PATH of a shell script under test.

They note what they are called with; those of srun and of ssh start processes here.
"""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

CLUSTER = Path(__file__).parents[2] / "docs" / "cluster"
# what the machine that runs the tests may have set
OWN = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JAX_COORD", "JAX_NUM", "JOB_")

# What it is called with, call after call.
NOTE = "line=$(printf '%q ' \"$@\")\nprintf '%s\\0' \"$line\" >> {folder}/{name}.calls\n"
# Ends with the codes in the file `codes`, one after the other, then with 0.
TRAIN = (
    NOTE
    + """exec 9> {folder}/lock
flock 9
echo "${{CUDA_VISIBLE_DEVICES-all}}" >> {folder}/devices
[ -e {folder}/codes ] || exit 0
code=$(head -n 1 {folder}/codes)
sed -i 1d {folder}/codes
exit "${{code:-0}}"
"""
)
# SLURM_NTASKS processes of the one node 127.0.0.1, with a step's variables.
SRUN = """
import os, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words = words[1:]
count = int(os.environ["SLURM_NTASKS"])
shared = {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_NUM_TASKS": str(count),
          "SLURM_STEP_TASKS_PER_NODE": str(count), "SLURM_STEP_ID": "0"}
tasks = [subprocess.Popen(words, env={**os.environ, **shared, "SLURM_PROCID": str(i),
                                      "SLURM_LOCALID": str(i)}) for i in range(count)]
sys.exit(max(task.wait() for task in tasks))
"""
# A machine room: `state` is what describe says, and what create and delete change. ssh runs its
# command in a folder for every worker; machines come without a virtual environment.
GCLOUD = """
import os, pathlib, shlex, shutil, subprocess, sys
folder, words = pathlib.Path({folder!r}), sys.argv[1:]
with open(folder / "gcloud.calls", "a") as file:
    file.write(shlex.join(words) + "\\0")
state, verb = folder / "state", words[3]
ready = {{"tpu-vm": "READY", "queued-resources": "ACTIVE"}}[words[2]]
if verb == "describe":
    if not state.exists():
        sys.exit("NOT_FOUND")
    print(state.read_text())
elif verb == "create":
    state.write_text(ready)
elif verb == "delete":
    state.unlink()
    shutil.rmtree(folder / "hosts", ignore_errors=True)
elif verb == "ssh":
    command = words[words.index("--command") + 1]
    worker = next(w for w in words if w.startswith("--worker=")).removeprefix("--worker=")
    found = []
    for i in range(2) if worker == "all" else [int(worker)]:
        home = folder / "hosts" / words[4] / str(i)
        home.mkdir(parents=True, exist_ok=True)
        path = f"{{folder}}/remote:{{os.environ['PATH']}}"
        remote = {{**os.environ, "HOME": str(home), "PATH": path}}
        command_line = ["bash", "-c", command]
        found.append(subprocess.run(command_line, cwd=home, env=remote).returncode)
    sys.exit(max(found))
"""
# On a machine: `python3 -m pip install uv`, which installs the fake ldm-train.
PYTHON = """mkdir -p ~/.local/bin && cat > ~/.local/bin/uv <<X
echo "\\$@" >> {folder}/uv.calls
mkdir -p ~/venv/bin && cp {folder}/bin/ldm-train ~/venv/bin/ldm-train
X
chmod +x ~/.local/bin/uv
"""


class Room:
    """A folder with fake commands, in which recipes run."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name, text in (
            ("bin/ldm-train", TRAIN),
            ("bin/scontrol", NOTE),
            ("bin/kubectl", f"{NOTE}cat > {{folder}}/stdin\n"),
            ("bin/gcloud", GCLOUD),
            ("bin/srun", SRUN),
            ("remote/python3", PYTHON),
            ("remote/pgrep", "exit 1\n"),
        ):
            if text != SRUN:
                text = text.format(folder=str(folder), name=Path(name).name)
            self.script(name, text, python=name in ("bin/gcloud", "bin/srun"))

    def script(self, name: str, text: str, python: bool = False) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        interpreter = f"{sys.executable} -IS" if python else "/bin/bash"  # without site-packages
        path.write_text(f"#!{interpreter}\n{text}")
        path.chmod(0o755)

    def environment(self, **variables: str) -> dict[str, str]:
        own = {k: v for k, v in os.environ.items() if not k.startswith(OWN)}
        path = f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**own, "PATH": path, **variables}

    def start(self, recipe: str, *arguments: str, **variables: str) -> subprocess.Popen:
        command = ["bash", str(CLUSTER / recipe), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(
            command, env=self.environment(**variables), cwd=self.folder, start_new_session=True,
            **pipes,
        )  # fmt: skip

    def run(self, recipe: str, *arguments: str, **variables: str) -> tuple[int, str]:
        """Exit code, and what was said."""
        process = self.start(recipe, *arguments, **variables)
        try:
            said, _ = process.communicate(timeout=300)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, said

    def calls(self, name: str) -> list[list[str]]:
        path = self.folder / f"{name}.calls"
        if not path.exists():
            return []
        return [shlex.split(call) for call in path.read_text().split("\0")[:-1]]
