"""A process that is gone or stands still is named, and one that is not is left alone."""

import json
import os
import time

import pytest

from ldm_jax import schema
from ldm_jax.train.run import watchdog

CONFIG = schema.WatchConfig(every=1.0, timeout=10.0, stall=50.0, pause=200.0)
ATTEMPT = 7


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def watches(run, count=2, config=CONFIG, attempt=ATTEMPT):
    made = [
        watchdog.Watch(run, config, index=i, count=count, attempt=attempt) for i in range(count)
    ]
    for watch in made:
        watch.step(3)
        watch.check(0.0)
    return made


def rounds(watch, seconds):
    """What a watch finds within so many rounds of one second."""
    for _ in range(seconds):
        watch.moves += 1  # its own main thread is fine
        found = watch.check(1.0)
        if found is not None:
            return found
    return None


def test_a_silent_process_is_named_after_the_timeout(run):
    first, second = watches(run)
    with second.doing("saving"):
        second.check(1.0)
        assert rounds(first, 11) is None
        why, retry = rounds(first, 1)
    assert f"process 1 (host {second.about['host']}, pid {os.getpid()}, step 3, saving)" in why
    assert "no sign of life for 11 s" in why
    assert retry


def test_a_slow_process_is_left_alone(run):
    first, second = watches(run)
    for _ in range(5):
        assert rounds(first, 9) is None
        assert second.check(1.0) is None


@pytest.mark.parametrize("state", ["done", "stopped"])
def test_a_process_that_ended_well_is_not_lost(run, state):
    first, second = watches(run)
    second.state = state
    second.check(1.0)
    assert rounds(first, 100) is None


def test_a_failure_elsewhere_is_told_at_once_but_lets_the_own_error_come_first(run):
    first, second = watches(run)
    second.state, second.why, second.retry = "failed", "ValueError: odd", False
    second.check(1.0)
    assert rounds(first, 1) is None
    why, retry = rounds(first, 1)
    assert "process 1" in why
    assert "ended: ValueError: odd" in why
    assert not retry


def test_a_ring_of_three_learns_what_one_of_them_finds(run):
    first, _, third = watches(run, 3)
    for _ in range(11):
        third.moves += 1
        assert third.check(1.0) is None  # watches the first
        assert rounds(first, 1) is None  # watches the second, which is silent
    why, retry = rounds(first, 1)
    watchdog.write_fault(run, ATTEMPT, "process 0", why, retry)
    assert rounds(third, 1) == (f"process 0 found: {why}", True)
    watchdog.write_fault(run, ATTEMPT, "process 2", "another", False)  # the first one counts
    assert rounds(third, 1) == (f"process 0 found: {why}", True)


def test_after_a_broken_operation_all_others_are_looked_at_and_sooner(run):
    first, second, _ = watches(run, 3)
    first.broken = True
    for _ in range(3):
        assert second.check(1.0) is None
        assert rounds(first, 1) is None
    second.check(1.0)
    assert rounds(first, 1) is None
    second.check(1.0)
    why, _ = rounds(first, 1)
    assert "process 2" in why
    assert "process 1" not in why


def test_what_an_earlier_start_left_is_not_believed(run):
    watches(run, attempt=6)
    watchdog.write_fault(run, 6, "process 1", "long ago", False)
    first = watchdog.Watch(run, CONFIG, index=0, count=2, attempt=ATTEMPT)
    assert rounds(first, 100) is None


@pytest.mark.parametrize("count", [1, 2])
def test_a_newer_start_takes_over(run, count, monkeypatch, capfd):
    monkeypatch.setattr(watchdog.time, "sleep", lambda _: None)
    left = []
    old, new = watches(run, count)[0], watches(run, count, attempt=8)[0]
    old._leave_with = left.append
    why, retry = rounds(old, 1)
    assert f"has taken its place in {run}" in why
    assert not retry
    old._leave(why, retry)
    assert left == [watchdog.LOST]
    assert "has taken its place" in capfd.readouterr().err
    assert rounds(new, 3) is None
    assert json.loads((run / "processes" / "0.json").read_text())["attempt"] == 8


def test_storage_that_is_down_is_no_death(run, monkeypatch, capsys):
    first, _ = watches(run)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(watchdog, "write", full)
        assert rounds(first, 100) is None
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert rounds(first, 10) is None
    assert rounds(first, 2) is not None


def test_nothing_is_written_before_the_run_is_there(tmp_path):
    watch = watchdog.Watch(tmp_path / "run", CONFIG, index=0, count=2, attempt=ATTEMPT)
    assert watch.check(1.0) is None
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("what", "limit"), [("reading a batch", 50), ("compiling", 200)])
def test_a_main_thread_that_stands_still_is_told(what, limit, capfd):
    watch = watchdog.Watch(None, CONFIG)
    watch.now["doing"] = what
    watch.moves += 1
    assert all(watch.check(1.0) is None for _ in range(limit + 1))
    why, retry = watch.check(1.0)
    assert what in why
    assert f"has stood still for {limit + 1} s" in why
    assert retry
    assert "test_watchdog.py" in capfd.readouterr().err  # where it stands


def test_steps_that_are_slow_by_nature_have_longer():
    watch = watchdog.Watch(None, CONFIG)
    watch.now["doing"] = "training"
    watch.step(1)
    watch.since -= 30.0  # seconds that the next step took
    watch.step(2)
    assert all(watch.check(1.0) is None for _ in range(300))
    assert any(watch.check(1.0) for _ in range(10))


def test_batches_pass_through_and_say_where_the_loop_is():
    watch = watchdog.Watch(None, CONFIG)
    found = []
    for i in watch.batches(iter(range(3))):
        found.append((i, watch.now["doing"]))
    assert found == [(i, "training") for i in range(3)]
    assert watch.now["doing"] == "reading a batch"


def test_the_thread_leaves_with_a_message_and_the_next_start_can_read_it(run, capsys):
    config = schema.WatchConfig(every=0.02, timeout=0.1)
    watches(run, config=config)[1].check(0.0)
    left = []
    watch = watchdog.Watch(run, config, count=2, attempt=ATTEMPT, leave=left.append)
    watch.start()
    until = time.monotonic() + 20
    while not left and time.monotonic() < until:
        time.sleep(0.01)
    watch.closing.set()
    watch.thread.join()
    assert left[0] == watchdog.LOST == 76
    assert "process 1" in capsys.readouterr().err
    fault = watchdog.read(run, "fault.json")
    assert (fault["attempt"], fault["by"], fault["retry"]) == (ATTEMPT, "process 0", True)
    assert watchdog.read(run, "0.json")["state"] == "lost"


def test_an_end_is_marked(run):
    config = schema.WatchConfig(every=0.01, timeout=0.1)
    with watchdog.watching(run, config, 1, 2, ATTEMPT) as watch:
        watch.step(5)
    assert watchdog.read(run, "1.json")["state"] == "done"
    with pytest.raises(OSError), watchdog.watching(run, config, 1, 2, ATTEMPT + 1) as watch:
        raise OSError("disk")
    beat = watchdog.read(run, "1.json")
    assert (beat["state"], beat["why"], beat["retry"]) == ("failed", "OSError: disk", True)


def test_times_that_make_no_sense_are_refused(run):
    config = schema.WatchConfig(every=5.0, timeout=6.0)
    with (
        pytest.raises(ValueError, match=r"watch\.every 5\.0 is not between 0 and half of .* 6\.0"),
        watchdog.watching(run, config, 0, 1, ATTEMPT),
    ):
        pass


@pytest.mark.parametrize(
    ("error", "stepped", "worth"),
    [
        (ValueError("config"), False, False),
        (ValueError("record"), True, True),
        (FileNotFoundError(2, "no such file"), False, False),
        (OSError(5, "I/O error"), False, True),
        (OSError(28, "full"), True, True),
        (FloatingPointError("nan"), True, False),
        (RuntimeError("DEADLINE_EXCEEDED"), False, True),
        (KeyboardInterrupt(), True, False),
    ],
)
def test_which_errors_another_start_may_cure(error, stepped, worth):
    assert watchdog.worth_retry(error, stepped) is worth
