"""What an earlier version wrote is read by this one: a run, its pictures, a program, a folder.

`golden/landing_*.tar.xz` was written before the move of November 2026, on one CPU device:

    run            tiny:text after 4 of 8 steps
    resumed.json   what steps 5 to 8 logged, and the version of jax
    prompt.png     of `run`;  program.png  of program.bin, which was exported from it
    converted      a diffusers folder made of tiny:unconditional, and converted.png of it

On the version of jax that wrote them, on two cores, everything repeats bit for bit, elsewhere
nearly: XLA cuts sums by the number of cores.
"""

import json
import os
import pathlib
import subprocess
import sys
import tarfile

import jax
import numpy as np
import pytest
from PIL import Image

GOLDEN = pathlib.Path(__file__).parent / "golden"
TIMES = ("steps_per_s", "images_per_s_per_device", "tflop_per_s_per_device", "goodput")


@pytest.fixture(scope="module")
def landing(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("landing")
    with tarfile.open(GOLDEN / "landing_2026_11.tar.xz") as tar:
        tar.extractall(root, filter="data")
    return root / "landing"


def command(landing, *argv):
    """A command as people run it, on one device as then, with all optimizations of XLA."""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"
    argv = [sys.executable, "-m", *argv]
    done = subprocess.run(argv, cwd=landing, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def written_by(landing):
    return json.loads((landing / "resumed.json").read_text())


def repeats_exactly(landing):
    return jax.__version__ == written_by(landing)["jax"] and len(os.sched_getaffinity(0)) == 2


def check_picture(landing, new, old):
    new, old = (np.asarray(Image.open(landing / f), np.int32) for f in (new, old))
    assert np.abs(new - old).max() <= (0 if repeats_exactly(landing) else 1)


def test_a_run_resumes(landing):
    flags = "--first-stage.path first_stage --first-stage.scale-images 16 --unet.channel-mult 1"
    argv = f"tiny:text --workdir run {flags} --steps 8 --intervals.save 4 --intervals.snapshot 8"
    command(landing, "ldm_jax.train.main", *argv.split())
    lines = (landing / "run/metrics/000005.jsonl").read_text().splitlines()
    then = written_by(landing)
    assert len(lines) == len(then["steps"]) == 4
    for line, step in zip(map(json.loads, lines), then["steps"]):
        values = [[x[n] for n in step if n not in TIMES] for x in (line, step)]
        if repeats_exactly(landing):
            assert values[0] == values[1]
        np.testing.assert_allclose(*values, rtol=1e-5)


def test_a_picture_repeats(landing):
    said = command(landing, *["ldm_jax.sample.main", "again", "prompt.png", "--out", "again"])
    assert "again/prompt.png" in said
    check_picture(landing, "again/prompt.png", "prompt.png")


def test_an_exported_program_runs(landing):
    argv = "text2img --model run --out program --steps 4 --num-images 1 --guidance-scale 3"
    argv = [*argv.split(), "--prompt", "a red disc", "--negative-prompt", "blurry", "--step", "4"]
    command(landing, "ldm_jax.sample.main", *argv, "--from-export", "program.bin")
    check_picture(landing, "program/00000_a_red_disc_seed0.png", "program.png")


def test_a_converted_folder_samples(landing):
    command(landing, *["ldm_jax.sample.main", "again", "converted.png", "--out", "folder"])
    check_picture(landing, "folder/converted.png", "converted.png")
