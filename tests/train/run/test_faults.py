"""Real processes that are killed: the others say who it was and leave, supervisors start again."""

import os
import signal
import time

import pytest
from two_processes import MIXED, SECONDS, assert_losses_as, codes, logs, training, two

from ldm_jax.runtime import checkpoint
from ldm_jax.train.run import watchdog

pytestmark = pytest.mark.slow
WATCH = ["--watch.every", "0.5", "--watch.timeout", "15"]


def at_step(run, step, processes, tmp_path):
    """Waits until both have made `step`; their signs of life."""
    until = time.monotonic() + SECONDS
    while True:
        beats = [watchdog.read(run, f"{i}.json") for i in range(2)]
        if all(beat and (beat["step"] or 0) >= step for beat in beats):
            return beats
        assert all(p.poll() is None for p in processes), logs(tmp_path)
        assert time.monotonic() < until, logs(tmp_path)
        time.sleep(0.02)


def test_the_other_names_a_killed_process_and_leaves(tmp_path, first_stage_run):
    run = tmp_path / "run"
    command = training(run, first_stage_run, *MIXED.split(), *WATCH, "--steps", "4000")
    with two(tmp_path, command) as processes:
        beats = at_step(run, 5, processes, tmp_path)
        processes[1].kill()
        begin = time.monotonic()
        assert processes[0].wait(SECONDS) == watchdog.LOST, logs(tmp_path)
        assert time.monotonic() - begin < 60
    said = (tmp_path / "0.log").read_text()
    assert f"process 1 (host {beats[1]['host']}, pid {beats[1]['pid']}, step " in said
    assert "is lost: no sign of life for" in said
    assert "process 0 leaves with code 76" in said


def test_supervisors_bring_a_killed_run_to_its_end(tmp_path, ldm_run, first_stage_run):
    run = tmp_path / "run"
    restart = ["--restart", "on-failure", "--restart-delay", "0.1"]
    command = training(run, first_stage_run, *MIXED.split(), *WATCH, *restart, "--steps", "400")
    with two(tmp_path, command) as processes:
        beats = at_step(run, 6, processes, tmp_path)
        os.kill(beats[1]["pid"], signal.SIGKILL)
        assert codes(tmp_path, processes) == [0, 0], logs(tmp_path)
    assert checkpoint.latest_step(run) == 400
    assert "was killed by SIGKILL" in (tmp_path / "0.log").read_text()
    assert "restart 1 in 0.1 s" in (tmp_path / "1.log").read_text()
    assert_losses_as(run, ldm_run, 8, exactly=False)
