"""Half-written or damaged checkpoints, a full disk, storage that fails: the last good one stays."""

import errno
import shutil
import time

import orbax.checkpoint as ocp
import pytest
from checkpoint_states import assert_same, flip, state_of

from ldm_jax.runtime import checkpoint, reading, storage

FULL = "RESOURCE_EXHAUSTED: Error writing \"a\": No space left on device [os_error_code='28']"


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A run with checkpoints of steps 1 and 2; tests copy it."""
    run = tmp_path_factory.mktemp("two")
    manager = checkpoint.manager(run)
    for step in (1, 2):
        assert checkpoint.save(manager, state_of(step), {})
    manager.close()
    return run


@pytest.fixture
def run(two_steps, tmp_path):
    return shutil.copytree(two_steps, tmp_path / "run")


@pytest.fixture
def said(capsys, shown):
    return lambda: capsys.readouterr().err


# --- resuming -----------------------------------------------------------------------------------


def test_the_newest_is_resumed_and_a_fresh_run_has_none(run, tmp_path):
    with checkpoint.manager(run) as manager:
        assert_same(checkpoint.resume(manager, state_of(7)), state_of(2))
    with checkpoint.manager(tmp_path / "new") as manager:
        assert checkpoint.resume(manager, state_of(7)) is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["bit", "meta", "missing"])
def test_a_damaged_one_is_set_aside_and_the_one_before_goes_on(run, said, damage):
    folder = run / "checkpoints" / "2"
    if damage == "bit":
        flip(run, 2)
    elif damage == "meta":
        text = (folder / "meta" / "metadata").read_text()
        (folder / "meta" / "metadata").write_text(text.replace('"bad_steps": 0', '"bad_steps": 1'))
        assert (folder / "meta" / "metadata").read_text() != text
    else:
        shutil.rmtree(folder / "opt_state")
    with checkpoint.manager(run) as manager:
        assert_same(checkpoint.resume(manager, state_of(7)), state_of(1))
        lines = said().splitlines()
        assert lines[0].startswith(f"{folder}: cannot be read (")
        assert lines[0].endswith(f"); moved to {run}/damaged/2")
        assert lines[1].endswith("going on from step 1, later steps are made again")
        assert len(lines) == 2
        assert checkpoint.saved_steps(manager) == [1]
        assert checkpoint.save(manager, state_of(2), {})  # made again
    assert (run / "damaged" / "2" / "meta").exists()
    flip(run, 2)
    with checkpoint.manager(run) as manager:
        checkpoint.resume(manager, state_of(7))
    assert sorted(p.name for p in (run / "damaged").iterdir()) == ["2", "2.2"]


def test_without_a_good_one_nothing_is_moved_and_nothing_starts_anew(run):
    for step in (1, 2):
        flip(run, step)
    with checkpoint.manager(run) as manager:
        message = r"checkpoints/2: cannot be read \(.*nor any older one"
        with pytest.raises(checkpoint.DamagedError, match=message):
            checkpoint.resume(manager, state_of(7))
    assert checkpoint.saved_steps(run) == [1, 2]
    assert not (run / "damaged").exists()


def test_another_model_is_no_damage(run):
    with checkpoint.manager(run) as manager, pytest.raises(ValueError, match="of another model"):
        checkpoint.resume(manager, state_of(7, width=32))
    assert checkpoint.saved_steps(run) == [1, 2]


@pytest.fixture
def failing_reads(monkeypatch):
    """Makes so many reads of arrays fail; {"left": count}."""
    real, left = ocp.PyTreeCheckpointHandler.restore, {"left": 0}

    def restore(self, directory, **arguments):
        left["left"] -= 1
        if left["left"] >= 0:
            raise ValueError("UNAVAILABLE: the store is busy")
        return real(self, directory, **arguments)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", restore)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    return left


def test_reads_that_fail_for_a_while_are_repeated(run, failing_reads):
    failing_reads["left"] = 3
    with checkpoint.manager(run) as manager:
        assert_same(checkpoint.resume(manager, state_of(7)), state_of(2))


def test_storage_that_stays_away_is_no_damage(run, failing_reads):
    failing_reads["left"] = 100
    message = r"checkpoints/2: the storage fails \(UNAVAILABLE"
    with checkpoint.manager(run) as manager, pytest.raises(OSError, match=message):
        checkpoint.resume(manager, state_of(7))
    assert checkpoint.saved_steps(run) == [1, 2]


def test_half_written_folders_are_named_and_removed(run, said):
    drafts = [
        run / "checkpoints/3.orbax-checkpoint-tmp",
        run / "snapshots/5.orbax-checkpoint-tmp-1",
    ]
    for draft in drafts:
        shutil.copytree(run / "checkpoints" / "2", draft)
    with checkpoint.manager(run) as manager:
        for draft, line in zip(drafts, said().splitlines(), strict=True):
            assert line == f"{draft}: is half written, the run ended while it was saved; removed"
        assert_same(checkpoint.resume(manager, state_of(7)), state_of(2))
        assert checkpoint.save(manager, state_of(3), {})
    assert not any(draft.exists() for draft in drafts)
    assert checkpoint.saved_steps(run) == [1, 2, 3]


# --- saving -------------------------------------------------------------------------------------


def test_without_room_nothing_is_begun(run, said, monkeypatch):
    with checkpoint.manager(run, max_to_keep=1, max_failed=1) as manager:
        monkeypatch.setattr(storage, "free_bytes", lambda path: 1000)
        assert not checkpoint.save(manager, state_of(3), {})
        (line,) = said().splitlines()
        assert line == (
            f"{run}/checkpoints: the checkpoint of step 3 was not written (the disk is full); it"
            " takes about 74.8 kB, 1.0 kB are free; that of step 2 is kept; training goes on,"
            " failed saves in a row: 1"
        )
        with pytest.raises(OSError, match=r"step 4 .* make room .*\(--max-failed-saves 1\)"):
            checkpoint.save(manager, state_of(4), {})
        assert checkpoint.saved_steps(run)[-1] == 2
        monkeypatch.undo()
        assert checkpoint.save(manager, state_of(5), {})
        checkpoint.saved_steps(manager)
        assert manager.failed == 0
        monkeypatch.setattr(storage, "free_bytes", lambda path: 1000)
        with pytest.raises(OSError, match=r"step 6 was not written .the disk is full"):
            checkpoint.save(manager, state_of(6), {}, final=True)
    assert checkpoint.saved_steps(run) == [5]


class Failed:
    """What a handler gives for a write that fails in the background."""

    def __init__(self, message):
        self.message = message

    def result(self, timeout=None):
        raise ValueError(self.message)

    def cancel(self):
        pass


@pytest.fixture
def failing_writes(monkeypatch):
    """Makes every write of arrays fail with the message in it, if any; {"message": text}."""
    real, how = ocp.PyTreeCheckpointHandler.async_save, {"message": ""}

    async def async_save(self, directory, **arguments):
        futures = await real(self, directory, **arguments)
        return [*futures, Failed(how["message"])] if how["message"] else futures

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "async_save", async_save)
    return how


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_write_that_fails_behind_the_back_is_said_at_the_next_step(
    run, said, failing_writes, monkeypatch
):
    with checkpoint.manager(run, max_to_keep=1, max_failed=2) as manager:
        failing_writes["message"] = FULL
        assert checkpoint.save(manager, state_of(3), {})
        wait_for(lambda: manager.check_writes() or manager.failed)
        (line,) = [line for line in said().splitlines() if "was not written" in line]
        assert "step 3 was not written (No space left on device)" in line
        assert "that of step 2 is kept; training goes on, failed saves in a row: 1" in line
        (draft,) = manager._drafts
        draft.mkdir(exist_ok=True)  # by a writer that has not heard of the failure
        (draft / "late").write_text("takes room")
        monkeypatch.setattr(storage, "free_bytes", lambda path: 0 if draft.exists() else None)
        assert checkpoint.saved_steps(manager)[-1] == 2
        assert not manager.retry_due  # room does not come by itself
        failing_writes["message"] = ""
        assert checkpoint.save(manager, state_of(5), {})
        assert not draft.exists()
        assert checkpoint.saved_steps(manager) == [5]
        assert manager.failed == 0
        assert_same(checkpoint.resume(manager, state_of(7)), state_of(5))


def test_a_write_is_made_again_where_storage_fails_for_a_while(
    run, said, failing_writes, monkeypatch
):
    monkeypatch.setattr(storage, "WAIT", 0.01)
    with checkpoint.manager(run, max_failed=0) as manager:
        failing_writes["message"] = "UNAVAILABLE: a hiccup"
        for step in (3, 4, 5):
            assert checkpoint.save(manager, state_of(step), {})
            wait_for(lambda: manager.check_writes() or manager.retry_due)
            line = [line for line in said().splitlines() if "was not written" in line][-1]
            assert f"step {step} was not written (UNAVAILABLE: a hiccup)" in line
            assert f"attempt {step - 1} of 4 follows in {0.01 * 2 ** (step - 3):g} s" in line
        failing_writes["message"] = ""
        assert checkpoint.save(manager, state_of(6), {})
        assert not manager.retry_due
        assert checkpoint.saved_steps(manager) == [1, 2, 6]
        failing_writes["message"] = "UNAVAILABLE: a hiccup"
        for step in (7, 8, 9):
            assert checkpoint.save(manager, state_of(step), {})
            wait_for(lambda: manager.check_writes() or manager.retry_due)
        checkpoint.save(manager, state_of(10), {})
        with pytest.raises(OSError, match=r"step 10 was not written .UNAVAILABLE"):
            wait_for(manager.check_writes)


def test_one_failed_write_too_many_ends_the_run(run, failing_writes):
    with checkpoint.manager(run) as manager:
        failing_writes["message"] = FULL
        checkpoint.save(manager, state_of(3), {})
        with pytest.raises(
            OSError, match=r"step 3 .*No space.*make room.*\(--max-failed-saves 0\)"
        ):
            wait_for(manager.check_writes)
    assert checkpoint.saved_steps(run) == [1, 2]


def test_a_failed_write_is_not_lost_at_the_end(run, failing_writes):
    manager = checkpoint.manager(run, max_failed=9)
    failing_writes["message"] = FULL
    checkpoint.save(manager, state_of(3), {}, final=True)
    with pytest.raises(OSError, match=r"step 3 was not written .No space left on device"):
        manager.close()
    assert checkpoint.saved_steps(run) == [1, 2]


def test_errors_of_the_file_system_keep_their_names():
    error = checkpoint._unreadable("folder", OSError(errno.EIO, "Input/output error"))
    assert isinstance(error, OSError)
    assert isinstance(checkpoint._unreadable("folder", MemoryError()), MemoryError)


def test_a_checkpoint_that_is_deleted_meanwhile_is_not_damaged(run, monkeypatch):
    """As the rotation of a run does while somebody samples from it."""
    read = reading.read_object

    def late(path):
        shutil.rmtree(run / "checkpoints" / "2", ignore_errors=True)
        return read(path)

    monkeypatch.setattr(reading, "read_object", late)
    with pytest.raises(FileNotFoundError, match=r"2: was deleted while it was read") as caught:
        checkpoint.restore_parts(run, 2, ("params",))
    assert not isinstance(caught.value, checkpoint.DamagedError)
