"""What people get wrong: one line with the value and the remedy, and no run left behind."""

import os
import pathlib
import shutil
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
def folder(tmp_path):
    """A data folder of eight images of 24 x 20 pixels, named with its place."""
    rng = np.random.default_rng(0)
    for i in range(8):
        picture = rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)
        images.save_png(tmp_path / "images" / f"{i}.png", picture)
    return tmp_path / "images"


# --- data ---------------------------------------------------------------------------------------


def test_data_folder_that_is_not_there(refused, tmp_path):
    run = tmp_path / "run"
    error = refused(
        f"ldm-train folder:first_stage --workdir {run} --data.source.path {tmp_path}/gone"
    )
    assert error == (
        f"data folder '{tmp_path}/gone' is not a folder here: give that of the images with"
        " --data.source.path"
    )
    assert not run.exists()


def test_empty_data_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    run = tmp_path / "run"
    error = refused(
        f"ldm-train folder:first_stage --workdir {run} --data.source.path {tmp_path}/empty"
    )
    assert error.startswith(f"no image in {tmp_path}/empty (looked for .bmp")
    assert error.endswith(": add some, or give another --data.source.path")
    assert not run.exists()


def test_unreadable_data_folder(refused, folder, tmp_path, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path) == str(folder):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # chmod does not stop a test that runs as root
    run = tmp_path / "run"
    error = refused(f"ldm-train folder:first_stage --workdir {run} --data.source.path {folder}")
    assert error == f"cannot read data folder {folder}: Permission denied; check its permissions"
    assert not run.exists()


def test_images_smaller_than_the_crop(refused, folder, tmp_path):
    run = tmp_path / "run"
    command = f"ldm-train folder:first_stage --workdir {run} --data.source.path {folder} {SMALL}"
    error = refused(f"{command} --data.size 32")
    assert str(folder) in error
    assert "20" in error
    assert "allow_upscale" in error
    assert not run.exists()


def test_no_image_can_be_decoded(refused, folder, tmp_path):
    for path in folder.iterdir():
        path.write_bytes(b"no image")
    command = f"ldm-train folder:first_stage --workdir {tmp_path}/run --data.size 16 {SMALL}"
    error = refused(f"{command} --data.source.path {folder}")
    assert error.startswith("not one record can be decoded; the last: ")
    error = refused(f"{command} --data.source.path {folder} --data.max-bad-records 2")
    assert error.startswith("3 records cannot be decoded, the last: ")
    assert "raise data.max_bad_records (2)" in error


def test_more_classes_than_the_config_says(refused, first_stage_run, tmp_path):
    run = tmp_path / "run"
    error = refused(
        f"ldm-train tiny:class --workdir {run} --first-stage.path {first_stage_run}"
        " --cond.num-classes 3"
    )
    assert error == "the data have 4 classes, but cond.num_classes is 3: set it to 4"
    assert not run.exists()


# --- sizes that do not fit ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--batch-size 6", "batch_size 6 is not a positive multiple of 4 devices"),
        ("--accumulate 4", "batch_size 8 is not a positive multiple of 4 devices"),
        ("--mesh.fsdp 3", "mesh data=-1, fsdp=3, tensor=1 does not fit 4 devices"),
        ("--steps 0", "--steps 0: give at least 1"),
        ("--data.size 15", "data.size 15 is not a multiple of the first stage's downsampling 2"),
        ("--data.channels 1", "data.channels is 1, but model.in_channels is 3"),
        ("--optimizer.schedule cosine", "optimizer.schedule 'cosine' needs decay_steps above"),
    ],
)
def test_training_flags_that_do_not_fit(refused, tmp_path, flags, complaint):
    error = refused(f"ldm-train tiny:first_stage --workdir {tmp_path}/run {flags}")
    assert error.startswith(complaint)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--labels 4", "--labels 4 is not in 0..3, the model's classes"),
        ("--labels 0 -1", "--labels -1 is not in 0..3"),
        ("--steps 0", "--steps 0 is not in 1..1000"),
        ("--steps 1001", "--steps 1001 is not in 1..1000"),
        ("--num-images 0", "--num-images 0: give at least 1"),
        ("--batch-size 6", "--batch-size 6 is not a multiple of 4 devices"),
        ("--step 5", "has no step 5; it has ["),
        ("--init-latents gone.npy", "[Errno 2] No such file or directory: 'gone.npy'"),
    ],
)
def test_sampling_flags_out_of_range(refused, ldm_run, tmp_path, flags, complaint):
    error = refused(f"ldm-sample class2img --model {ldm_run} --out {tmp_path}/out {flags}")
    assert complaint in error


def test_start_latents_of_another_shape(refused, ldm_run, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 8, 8, 4), np.float32))
    error = refused(
        f"ldm-sample class2img --model {ldm_run} --out {tmp_path}/out --labels 1 --num-images 3"
        f" --init-latents {tmp_path}/x.npy"
    )
    assert error.endswith("holds (2, 8, 8, 4), needed is (3, 8, 8, 4)")


# --- places ---------------------------------------------------------------------------------------


def test_workdir_that_is_not_a_run(refused, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    error = refused(f"ldm-train tiny:first_stage --workdir {tmp_path}")
    assert error.startswith(f"{tmp_path}: is not a run (files, but no config.json)")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_workdir_of_another_run(refused, first_stage_run, tmp_path):
    shutil.copy(first_stage_run / "config.json", tmp_path / "config.json")
    error = refused(f"ldm-train tiny:first_stage --workdir {tmp_path} --seed 7")
    assert error.startswith(f"{tmp_path}: holds another run, of which these differ: seed: 23 -> 7.")


def test_workdir_below_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("")
    error = refused(f"ldm-train tiny:first_stage --workdir {tmp_path}/file/run")
    assert error.startswith(f"{tmp_path}/file/run: cannot be written (")
    assert error.endswith("choose another --workdir")
    error = refused(f"ldm-train tiny:first_stage --workdir {tmp_path}/file")
    assert error.startswith(f"{tmp_path}/file: is a file; --workdir takes a directory")


@pytest.mark.parametrize("path", ["", "gone"])
def test_first_stage_that_is_not_there(refused, tmp_path, path):
    flags = f"--first-stage.path {tmp_path}/{path}" if path else ""
    error = refused(f"ldm-train tiny:class --workdir {tmp_path}/run {flags}")
    expected = f"{tmp_path}/gone: does not exist" if path else "no first stage: give --first-stage"
    assert error.startswith(expected)
    assert not (tmp_path / "run").exists()


def test_model_that_is_no_latent_diffusion_model(refused, first_stage_run, tmp_path):
    sample = f"ldm-sample class2img --out {tmp_path}/out --model"
    assert refused(f"{sample} {tmp_path}/gone") == f"{tmp_path}/gone: does not exist"
    assert refused(f"{sample} {tmp_path}").startswith(f"{tmp_path}: is not a run directory")
    assert "is a first stage alone" in refused(f"{sample} {first_stage_run}")
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written(refused, ldm_run, tmp_path):
    (tmp_path / "file").write_text("")
    sample = f"ldm-sample class2img --model {ldm_run} --out"
    assert refused(f"{sample} {tmp_path}/file") == f"--out {tmp_path}/file is a file; give a folder"
    error = refused(f"{sample} {tmp_path}/file/out")
    assert error == f"--out {tmp_path}/file/out cannot be made: Not a directory"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.png").write_text("")
    assert refused(f"{sample} {tmp_path}/full").endswith("give another folder or --overwrite")


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="no /proc here")
def test_output_that_not_even_root_can_write(refused, ldm_run):
    error = refused("ldm-train tiny:first_stage --workdir /proc/run")
    assert error.startswith("/proc/run: cannot be written (No such file or directory); choose")
    sample = f"ldm-sample class2img --model {ldm_run} --out"
    assert refused(f"{sample} /proc/out").startswith("--out /proc/out cannot be made: No such file")
    error = refused(f"{sample} /proc")  # it is there, and root may write by its permissions
    assert error.startswith("--out /proc cannot be written: No such file or directory; give")


# --- from a shell ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "arguments", "error"),
    [
        (
            "train",
            "tiny:first_stage --workdir run --steps 0",
            "ldm-train: error: --steps 0: give at least 1",
        ),
        (
            "sample",
            "class2img --model gone --out out",
            "ldm-sample: error: {here}/gone: does not exist",
        ),
    ],
)
def test_a_shell_sees_one_line_and_a_code(tmp_path, module, arguments, error):
    done = subprocess.run(
        [sys.executable, "-m", f"ldm_jax.{module}.main", *arguments.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stderr == error.format(here=tmp_path) + "\n"
    assert (done.stdout, done.returncode) == ("", 1)
    assert not any(tmp_path.iterdir())


# --- while it runs --------------------------------------------------------------------------------


@pytest.mark.slow  # the same of the other recipe stands in test_train_ldm
@pytest.mark.usefixtures("quick_compilation")
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
