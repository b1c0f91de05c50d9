"""What people get wrong: one line with the value and the remedy, and no run left behind."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from ldm_jax.runtime import checkpoint, cli, images
from ldm_jax.sample import main as sample_main
from ldm_jax.train import main as train_main

COMMANDS = {"ldm-train": train_main.train, "ldm-sample": sample_main.sample}
SMALL = "--model.channels 32 --model.channel-mult 1 1 --model.num-res-blocks 0 --batch-size 4"


def call(command: str) -> tuple[int, str]:
    """Exit code of a command line, run in this process; and its program."""
    program, *argv = command.split()
    return cli.run(program, COMMANDS[program], [*argv, "--no-compilation-cache"]), program


@pytest.fixture
def refused(capsys):
    """refused(command) -> its error, which must be the one and last line of the kind."""

    def run(command: str) -> str:
        code, program = call(command)
        err = capsys.readouterr().err
        assert code == 1
        assert "Traceback" not in err
        lines = err.strip().splitlines()
        assert [line for line in lines if line.startswith(f"{program}: ")] == lines[-1:]
        return lines[-1].removeprefix(f"{program}: error: ")

    return run


@pytest.fixture
def places(tmp_path):
    """Folders and files that people have: {tmp} in the commands below."""
    rng = np.random.default_rng(0)
    for i in range(8):
        picture = rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)
        images.save_png(tmp_path / "images" / f"{i}.png", picture)
    broken = [f"broken/{i}.png" for i in range(8)]
    for name in ("empty/", "mine/thesis.tex", "file", "full/a.png", *broken):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("x")
    np.save(tmp_path / "x.npy", np.zeros((2, 8, 8, 4), np.float32))
    return tmp_path


FOLDER = "ldm-train folder:first_stage --workdir {tmp}/run --data.source.path"
STAGE = "ldm-train tiny:first_stage --workdir {tmp}/run"
LDM = "ldm-train tiny:class --workdir {tmp}/run"
WORKDIR = "ldm-train tiny:first_stage --workdir"
DRAW = "ldm-sample class2img --model {ldm_run} --out {tmp}/out"
OUT = "ldm-sample class2img --model {ldm_run} --out"
MODEL = "ldm-sample class2img --out {tmp}/out --model"


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (f"{FOLDER} {{tmp}}/gone", "data folder '{tmp}/gone' is not a folder here: give that of"),
        (f"{FOLDER} {{tmp}}/empty", "no image in {tmp}/empty (looked for .bmp"),
        (f"{FOLDER} {{tmp}}/images {SMALL} --data.size 32", "allow_upscale"),
        (
            f"{FOLDER} {{tmp}}/broken {SMALL} --data.size 16",
            "not one record can be used; the last: ",
        ),
        (f"{STAGE} --batch-size 6", "batch_size 6 is not a positive multiple of 4 devices"),
        (f"{STAGE} --accumulate 4", "batch_size 8 is not a positive multiple of 4 devices"),
        (f"{STAGE} --mesh.fsdp 3", "mesh data=-1, fsdp=3, tensor=1 does not fit 4 devices"),
        (f"{STAGE} --steps 0", "--steps 0: give at least 1"),
        (
            f"{STAGE} --data.size 15",
            "data.size 15 is not a multiple of the first stage's downsampl",
        ),
        (f"{STAGE} --data.channels 1", "data.channels is 1, but model.in_channels is 3"),
        (f"{STAGE} --optimizer.schedule cosine", "optimizer.schedule 'cosine' needs decay_steps"),
        (LDM, "no first stage: give --first-stage"),
        (f"{LDM} --first-stage.path {{tmp}}/gone", "{tmp}/gone: does not exist"),
        (
            f"{LDM} --first-stage.path {{first_stage_run}} --cond.num-classes 3",
            "the data have 4 classes, but cond.num_classes is 3: set it to 4",
        ),
        (f"{WORKDIR} {{tmp}}/mine", "{tmp}/mine: is not a run (files, but no config.json)"),
        (f"{WORKDIR} {{tmp}}/file/run", "{tmp}/file/run: cannot be written ("),
        (f"{WORKDIR} {{tmp}}/file", "{tmp}/file: is a file; --workdir takes a directory"),
        (
            f"{WORKDIR} {{first_stage_run}} --seed 7",
            "holds another run, of which these differ: seed",
        ),
        (f"{MODEL} {{tmp}}/gone", "{tmp}/gone: does not exist"),
        (f"{MODEL} {{tmp}}/mine", "{tmp}/mine: is not a run directory"),
        (f"{MODEL} {{first_stage_run}}", "is a first stage alone"),
        (f"{OUT} {{tmp}}/file", "--out {tmp}/file is a file; give a folder"),
        (f"{OUT} {{tmp}}/file/out", "--out {tmp}/file/out cannot be made: Not a directory"),
        (
            f"{OUT} {{tmp}}/full",
            "holds pictures that no command wrote (a.png); give another folder",
        ),
        (f"{DRAW} --labels 4", "--labels 4 is not in 0..3, the model's classes"),
        (f"{DRAW} --labels 0 -1", "--labels -1 is not in 0..3"),
        (f"{DRAW} --steps 0", "--steps 0 is not in 1..1000"),
        (f"{DRAW} --steps 1001", "--steps 1001 is not in 1..1000"),
        (f"{DRAW} --num-images 0", "--num-images 0: give at least 1"),
        (f"{DRAW} --batch-size 6", "--batch-size 6 is not a multiple of 4 devices"),
        (f"{DRAW} --step 5", "has no step 5; it has ["),
        (f"{DRAW} --init-latents gone.npy", "[Errno 2] No such file or directory: 'gone.npy'"),
        (
            f"{DRAW} --labels 1 --num-images 3 --init-latents {{tmp}}/x.npy",
            "holds (2, 8, 8, 4), needed is (3, 8, 8, 4)",
        ),
    ],
    ids=lambda text: text.replace("{", "").replace("}", "")[-60:],
)
def test_a_mistake_is_one_line_and_leaves_nothing(refused, places, request, command, complaint):
    given = {"tmp": places}
    for run in ("ldm_run", "first_stage_run"):
        if run in command:
            given[run] = request.getfixturevalue(run)
    before = {path for path in places.rglob("*") if path.is_file()}
    assert complaint.format(**given) in refused(command.format(**given))
    assert {path for path in places.rglob("*") if path.is_file()} == before


def test_too_many_broken_images_name_the_limit(refused, places):
    for path in (places / "images").iterdir():
        path.write_bytes(b"no image")
    command = f"{FOLDER} {{tmp}}/images {SMALL} --data.max-bad-records 2".format(tmp=places)
    error = refused(command)
    assert error.startswith("3 records cannot be used, the last: ")
    assert "raise data.max_bad_records (2)" in error


def test_unreadable_data_folder(refused, places, monkeypatch):
    folder, scandir = places / "images", os.scandir

    def refuse(path):
        if str(path) == str(folder):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # chmod does not stop a test that runs as root
    error = refused(f"{FOLDER} {folder}".format(tmp=places))
    assert error == f"cannot read data folder {folder}: Permission denied; check its permissions"


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="no /proc here")
def test_output_that_not_even_root_can_write(refused, ldm_run):
    error = refused(f"{WORKDIR} /proc/run")
    assert error.startswith("/proc/run: cannot be written (No such file or directory); choose")
    sample = OUT.format(ldm_run=ldm_run)
    assert refused(f"{sample} /proc/out").startswith("--out /proc/out cannot be made: No such file")
    error = refused(f"{sample} /proc")  # it is there, and root may write by its permissions
    assert error.startswith("--out /proc cannot be written: No such file or directory; give")


# --- from a shell ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "arguments", "error"),
    [
        ("train", "tiny:first_stage --workdir run --steps 0", "--steps 0: give at least 1"),
        ("sample", "class2img --model gone --out out", "{here}/gone: does not exist"),
    ],
)
def test_a_shell_sees_one_line_and_a_code(tmp_path, module, arguments, error):
    done = subprocess.run(
        [sys.executable, "-m", f"ldm_jax.{module}.main", *arguments.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stderr == f"ldm-{module}: error: {error.format(here=tmp_path)}\n"
    assert (done.stdout, done.returncode) == ("", 1)
    assert not any(tmp_path.iterdir())


# --- while it runs --------------------------------------------------------------------------------


@pytest.mark.slow  # the same of the other recipe stands in test_train_ldm
def test_loss_that_stays_not_finite(refused, tmp_path):
    run = tmp_path / "run"
    error = refused(
        f"ldm-train tiny:first_stage --workdir {run} {SMALL} --optimizer.learning-rate 1e30"
        " --max-bad-steps 2 --intervals.save 1"
    )
    assert error.startswith("loss or gradient not finite at step 4 and for 3 steps in a row")
    assert "(batches 1 to 3; limit --max-bad-steps 2)" in error
    newest = checkpoint.latest_step(run)
    assert f"the last good checkpoint is step {newest} in {run}" in error


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="--steps 0"):
        call(f"ldm-train tiny:first_stage --workdir {tmp_path}/run --steps 0 --debug")
