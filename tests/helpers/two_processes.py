"""Two real processes under jax.distributed, and what their runs must have logged."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest
from runs import ldm_flags

from ldm_jax.runtime import rundir

SECONDS = 600  # after which both processes are killed and the test fails


MIXED = "--mesh.data 2 --mesh.fsdp 2"


@contextlib.contextmanager
def two(tmp_path, command):
    """Two processes of two devices each run command(address of both, index); killed at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = []
    try:
        for i in range(2):
            with (tmp_path / f"{i}.log").open("w") as log:
                arguments = [sys.executable, *command(f"127.0.0.1:{port},2,{i}")]
                root = pathlib.Path(__file__).parents[2]
                processes.append(subprocess.Popen(arguments, stderr=log, env=environment, cwd=root))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def codes(tmp_path, processes):
    """Their exit codes, or a failure with what they said, when both ended or time is up."""
    until = time.monotonic() + SECONDS
    try:
        return [p.wait(max(0.1, until - time.monotonic())) for p in processes]
    except subprocess.TimeoutExpired:
        pytest.fail(f"still running after {SECONDS} s: {logs(tmp_path)}")


def logs(tmp_path):
    return "\n".join((tmp_path / f"{i}.log").read_text()[-3000:] for i in range(2))


def training(run, first_stage_run, *more):
    """ldm-train with the flags of `ldm_run`."""
    flags = ldm_flags(first_stage_run, "--workdir", str(run), *more)
    return lambda address: [
        *("-m", "ldm_jax.train.main", "tiny:class", "--distributed", address),
        *flags,
    ]


def assert_losses_as(run, one_process, count, exactly=True):
    """The loss of the first `count` steps is that of one process."""
    found = [m["loss"] for m in rundir.read_metrics(run)]
    assert len(found) == count or not exactly
    expected = [m["loss"] for m in rundir.read_metrics(one_process)]
    assert found[:count] == pytest.approx(expected[:count], rel=1e-4)
