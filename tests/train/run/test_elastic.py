"""A run goes on on other devices and meshes: what stays equal, and what is refused.

On another number of processes: `test_multiprocess.py`.
"""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import recipes
from runs import ldm_flags

from ldm_jax import schema
from ldm_jax.runtime import checkpoint, cli, rundir
from ldm_jax.train import autoencoder, main

ROOT = pathlib.Path(__file__).parents[3]
PARTS = ("params", "ema_params", "opt_state")
GAN = (*PARTS, "disc_params", "disc_stats", "disc_opt_state")


def ended_as(run, expected, step, parts, record_property):
    """{part: largest difference} of two runs at `step`, also recorded, and that of the losses."""
    ends = [checkpoint.restore_parts(r, step, parts) for r in (run, expected)]
    found = {n: recipes.largest_difference(ends[0][n], ends[1][n]) for n in parts}
    lines = [[m["loss"] for m in rundir.read_metrics(r) if "loss" in m] for r in (run, expected)]
    assert len(lines[0]) == step
    found["losses"] = float(np.max(np.abs(np.divide(lines[0], lines[1][:step]) - 1)))
    record_property("differences", found)
    return found


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--accumulate 4", "batch_size 8 .* 4 devices .* x 4 microbatches .* keeps its batch_size"),
        ("--mesh.data 3", "data=3, fsdp=1, tensor=1 does not fit 4 devices"),
        ("--mesh.dcn-data 2", "4 devices are in 1 slice"),
    ],
)
def test_a_mesh_that_does_not_fit_leaves_the_run_as_it_was(
    tmp_path, ldm_run, first_stage_run, flags, message, capsys
):
    half = recipes.copy_until(ldm_run, 12, tmp_path / "half")
    before = (half / "config.json").read_bytes()
    arguments = ldm_flags(first_stage_run, "--workdir", str(half), *flags.split())
    assert cli.run("ldm-train", main.train, ["tiny:class", *arguments]) == 1
    (error,) = [e for e in capsys.readouterr().err.splitlines() if "error:" in e]
    assert re.search(message, error)
    assert (half / "config.json").read_bytes() == before
    assert checkpoint.saved_steps(half) == [4, 8, 12]


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--mesh.data 2", "--mesh.data 1 --mesh.fsdp 2"], ids=str)
def test_it_goes_on_on_fewer_devices(tmp_path, ldm_run, first_stage_run, flags, record_property):
    half = recipes.copy_until(ldm_run, 12, tmp_path / "half")
    arguments = ldm_flags(first_stage_run, "--workdir", str(half), *flags.split())
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-m", "ldm_jax.train.main", "tiny:class", *arguments]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = ended_as(half, ldm_run, 24, PARTS, record_property)
    assert found["losses"] < 1e-4


@pytest.fixture(scope="module")
def gan_runs(tmp_path_factory):
    """(config, uninterrupted run of 6 steps) of both kinds of first stage, each made once."""
    made = {}

    def make(stage):
        if stage not in made:
            every = schema.IntervalConfig(log=1, save=3, snapshot=0, evaluate=0, sample=0)
            loss = schema.FirstStageLossConfig(
                disc_start=0, learn_logvar=stage == "gan", lecam_weight=0.1
            )
            config = recipes.gan_config(stage, loss=loss, intervals=every, steps=6, max_to_keep=9)
            run = tmp_path_factory.mktemp(stage) / "run"
            assert autoencoder.train(config, run) == 0
            made[stage] = config, run
        return made[stage]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["gan", "vq"])
@pytest.mark.parametrize(
    "mesh", [{"data": 1, "fsdp": 4}, {"data": 2, "fsdp": 2}, {"fsdp": 2, "tensor": 2}], ids=str
)
def test_a_first_stage_and_its_discriminator_go_on_on_another_mesh(
    tmp_path, gan_runs, stage, mesh, record_property
):
    config, whole = gan_runs(stage)
    half = recipes.copy_until(whole, 3, tmp_path / "half")
    config = dataclasses.replace(config, mesh=schema.MeshConfig(**mesh))
    assert autoencoder.train(config, half) == 0
    parts = (*GAN, "codes") if stage == "vq" else GAN
    found = ended_as(half, whole, 6, parts, record_property)
    assert found["losses"] < 1e-4
    assert max(found.values()) < 1e-4
