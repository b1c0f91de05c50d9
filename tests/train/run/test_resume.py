"""A run that was killed, stopped or moved ends as if nothing had happened, bit for bit."""

import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import recipes
from checkpoint_states import flip
from runs import ldm_config, ldm_flags

from ldm_jax import loading
from ldm_jax.runtime import checkpoint, cli, rundir
from ldm_jax.train import ldm

STEPS = 24
PARTS = ("params", "ema_params", "opt_state")
SECONDS = 600  # after which a subprocess is killed and the test fails


def assert_same_end(run, uninterrupted):
    """Parameters, average, moments, counters and the loss of every step agree in every bit."""
    ends = [checkpoint.restore_parts(r, STEPS, PARTS) for r in (run, uninterrupted)]
    recipes.assert_same_bits(*ends)
    metas = [checkpoint.read_meta(_folder(r, STEPS)) for r in (run, uninterrupted)]
    assert metas[0]["checksums"] == metas[1]["checksums"]
    losses = [
        [(m["step"], m["loss"]) for m in rundir.read_metrics(r)] for r in (run, uninterrupted)
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, STEPS + 1))


def resume(run, first_stage_run, *more):
    """Goes on in this process: another than the one that was stopped."""
    return ldm.train(ldm_config(first_stage_run, *more), run)


class Training:
    """`ldm-train` in a process of its own, with the devices and the flags of `ldm_run`."""

    def __init__(self, run, first_stage_run):
        self.run, self.log = run, run.with_suffix(".log")
        command = [sys.executable, "-m", "ldm_jax.train.main", "tiny:class"]
        flags = ["--workdir", str(run), *ldm_flags(first_stage_run)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *flags], stderr=log, cwd=pathlib.Path(__file__).parents[3]
            )

    def send_at(self, step, number):
        """Waits for the checkpoint of `step`, sends the signal a moment later: the exit code."""
        until = time.monotonic() + SECONDS
        try:
            while not _folder(self.run, step).exists():
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < until, self.log.read_text()
                time.sleep(0.002)
            time.sleep(random.uniform(0, 0.05))
            self.process.send_signal(number)
            return self.process.wait(SECONDS)
        finally:
            self.process.kill()
            self.process.wait()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_run_killed_then_stopped_and_moved_ends_as_if_never_interrupted(
    tmp_path, ldm_run, first_stage_run, number, monkeypatch
):
    run, early = tmp_path / "run", random.choice((4, 8))
    assert Training(run, first_stage_run).send_at(early, signal.SIGKILL) == -signal.SIGKILL
    assert early <= checkpoint.latest_step(run) < STEPS
    training = Training(run, first_stage_run)
    assert training.send_at(random.choice((12, 16)), number) == cli.INTERRUPTED
    stopped = checkpoint.latest_step(run)
    assert f"stopped at step {stopped} of 24" in training.log.read_text()
    assert [m["step"] for m in rundir.read_metrics(run)] == list(range(1, stopped + 1))

    moved = tmp_path / "else" / "where"
    moved.parent.mkdir()
    run.rename(moved)
    monkeypatch.setattr(loading, "load_first_stage", None)  # the run has its own copy
    assert int(loading.load(moved).params["unet"]["conv_in"]["bias"].shape[0]) == 32
    assert resume(moved, first_stage_run) == 0
    assert_same_end(moved, ldm_run)


@pytest.fixture
def half(tmp_path, ldm_run):
    """A copy of the run as it was at step 12."""
    return recipes.copy_until(ldm_run, 12, tmp_path / "half")


@pytest.mark.slow
def test_it_goes_on_on_another_mesh(half, ldm_run, first_stage_run, capsys, shown):
    assert resume(half, first_stage_run, "--mesh.data", "2", "--mesh.fsdp", "2") == 0
    said = capsys.readouterr().err
    assert "changed on resume: mesh.data: -1 -> 2" in said
    assert "changed on resume: mesh.fsdp: 1 -> 2" in said
    assert checkpoint.read_meta(_folder(half, STEPS))["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    losses = [[m["loss"] for m in rundir.read_metrics(r)] for r in (half, ldm_run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) == STEPS


def test_a_finished_run_says_so(ldm_run, first_stage_run, capsys, shown):
    assert resume(ldm_run, first_stage_run) == 0
    assert "already at step 24 of 24; raise --steps to go on" in capsys.readouterr().err


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_and_its_steps_are_made_again(
    half, ldm_run, first_stage_run, capsys, shown
):
    flip(half, 12)
    assert resume(half, first_stage_run) == 0
    said = capsys.readouterr().err
    assert f"{_folder(half, 12)}: cannot be read (the checksum of params differs)" in said
    assert f"moved to {half}/damaged/12" in said
    assert "checkpoints: going on from step 8, later steps are made again" in said
    assert (half / "damaged" / "12").is_dir()
    assert_same_end(half, ldm_run)


def _folder(run, step):
    return rundir.epath.Path(run) / "checkpoints" / str(step)
