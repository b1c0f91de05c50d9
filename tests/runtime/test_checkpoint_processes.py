"""Two processes save, resume and fail together: what one of them meets, both know."""

import os
import pathlib
import time

import pytest
from checkpoint_states import flip
from two_processes import codes, logs, two

from ldm_jax.runtime import checkpoint

pytestmark = pytest.mark.slow

TESTS = pathlib.Path(__file__).parents[1]
# argv: address, run, what to do; ends with code 0 if all is as it says here
SCRIPT = """
import sys, time, jax, numpy as np, orbax.checkpoint as ocp
from checkpoint_states import assert_same, state_of
from ldm_jax import schema, sharding
from ldm_jax.runtime import checkpoint, cli, log, processes, storage
cli.join_processes(sys.argv[1])
run, what, second = sys.argv[2], sys.argv[3], jax.process_index() == 1

def local(state):
    return [np.asarray(s.data) for x in jax.tree.leaves(state) for s in x.addressable_shards]

def resumes(manager, step):
    found = checkpoint.resume(manager, state_of(9))
    assert_same(local(found), local(state_of(step)))

def save():
    with checkpoint.manager(run) as manager:
        assert checkpoint.resume(manager, state_of(9)) is None
        for step in (1, 2):
            assert checkpoint.save(manager, state_of(step), {})
        assert not checkpoint.save(manager, state_of(2), {})

def resume(step):
    with checkpoint.manager(run) as manager:
        resumes(manager, step)

def one_cannot_read():
    real = ocp.PyTreeCheckpointHandler.restore
    def restore(self, directory, **arguments):
        if second and directory.parent.name == "2":
            raise ValueError("a chunk of this process is gone")
        return real(self, directory, **arguments)
    ocp.PyTreeCheckpointHandler.restore = restore
    with checkpoint.manager(run) as manager:
        resumes(manager, 1)
        assert checkpoint.save(manager, state_of(2), {})

def one_has_no_room():
    real = storage.free_bytes
    with checkpoint.manager(run, max_failed=1) as manager:
        storage.free_bytes = lambda path: 10 if second else real(path)
        assert not checkpoint.save(manager, state_of(3), {})
        try:
            checkpoint.save(manager, state_of(4), {})
        except OSError as error:
            assert "the disk is full" in str(error)
        else:
            raise SystemExit("no error")
        storage.free_bytes = real
        assert checkpoint.save(manager, state_of(5), {})

class Failed:
    def result(self, timeout=None):
        raise ValueError("No space left on device")
    def cancel(self):
        pass

def one_cannot_write():
    real = ocp.PyTreeCheckpointHandler.async_save
    async def async_save(self, directory, **arguments):
        futures = await real(self, directory, **arguments)
        return [*futures, Failed()] if second else futures
    ocp.PyTreeCheckpointHandler.async_save = async_save
    with checkpoint.manager(run, max_failed=5) as manager:
        checkpoint.save(manager, state_of(3), {})
        while True:
            manager.check_writes()
            time.sleep(0.02)

def bad_records():
    assert processes.union({4, 7} if second else set()) == {4, 7}
    assert processes.union(set()) == set()
    assert processes.union({7} if second else {1, 2}) == {1, 2, 7}

with log.shown():
    eval(what)
"""


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setenv(
        "PYTHONPATH", str(TESTS / "helpers") + os.pathsep + os.environ.get("PYTHONPATH", "")
    )


def both(tmp_path, run, what):
    with two(tmp_path, lambda address: ["-c", SCRIPT, address, str(run), what]) as processes:
        assert codes(tmp_path, processes) == [0, 0], logs(tmp_path)
    return logs(tmp_path)


def test_what_one_process_meets_both_know(tmp_path, run):
    both(tmp_path, run, "save()")
    assert checkpoint.saved_steps(run) == [1, 2]
    both(tmp_path, run, "resume(2)")
    assert "moved to" in both(tmp_path, run, "one_cannot_read()")
    assert checkpoint.saved_steps(run) == [1, 2]
    assert (run / "damaged" / "2").is_dir()
    flip(run, 2, "opt_state")
    said = both(tmp_path, run, "resume(1)")
    assert f"moved to {run}/damaged/2.2" in said
    said = both(tmp_path, run, "one_has_no_room()")
    assert "the checkpoint of step 3 was not written (the disk is full)" in said
    assert checkpoint.saved_steps(run) == [1, 5]
    both(tmp_path, run, "bad_records()")


def test_a_process_that_cannot_write_says_so_and_does_not_wait(tmp_path, run):
    command = lambda address: ["-c", SCRIPT, address, str(run), "one_cannot_write()"]  # noqa: E731
    with two(tmp_path, command) as processes:
        until = time.monotonic() + 120
        while "was not written" not in (tmp_path / "1.log").read_text():
            assert time.monotonic() < until, logs(tmp_path)
            time.sleep(0.1)
        processes[0].kill()  # which the watch of a run would have ended
        assert processes[1].wait(60) != 0
    said = (tmp_path / "1.log").read_text()
    assert "OSError" in said
    assert "the checkpoint of step 3 was not written (No space left on device)" in said
    assert checkpoint.saved_steps(run) == []
