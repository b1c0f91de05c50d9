"""What a supervisor does with processes that fail, hang and are stopped: small scripts stand in."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ldm_jax.runtime import cli
from ldm_jax.train import main
from ldm_jax.train.run import supervisor, watchdog
from ldm_jax.train.run.supervisor import End, Restart

QUICK = Restart(max_restarts=3, restart_delay=0.01)

# tell(...) writes to the supervisor; `start` is 0 for the first process, 1 for the next, ...
SCRIPT = """
import json, os, pathlib, signal, sys, time
pipe, starts = int(os.environ["LDM_JAX_SUPERVISOR"]), pathlib.Path(sys.argv[1])
start = len(list(starts.iterdir()))
(starts / str(start)).touch()
def tell(**values):
    values = {"host": "h", "pid": 5, "index": 0, "doing": "training", "count": 1, **values}
    os.write(pipe, (json.dumps(values) + "\\n").encode())
"""


@pytest.fixture
def supervise(tmp_path):
    """supervise(body, restart) -> (exit code, what was said, how many processes were started)."""

    def run(body, restart=QUICK):
        said = []
        command = [sys.executable, "-S", "-E", "-c", SCRIPT + body, str(tmp_path)]
        code = supervisor.supervise(command, restart, said.append)
        return code, said, len(list(tmp_path.iterdir()))

    return run


def test_a_run_that_fails_is_started_again_until_it_ends_well(supervise):
    code, said, starts = supervise(
        "tell(state='running', step=4)\n"
        "if start < 2: tell(state='failed', why='OSError: disk', step=4)\n"
        "sys.exit(start < 2)"
    )
    assert (code, starts, len(said)) == (0, 3, 2)
    assert "process 0 (host h, pid 5, step 4, training): OSError: disk" in said[0]
    assert "no checkpoint yet, 4 steps are made again; restart 1 in 0.01 s" in said[0]
    assert "restart 2 in 0.02 s" in said[1]


def test_restarts_without_progress_are_bounded(supervise):
    code, said, starts = supervise("os.kill(os.getpid(), signal.SIGKILL)")
    assert (code, starts) == (137, 4)
    assert "killed by SIGKILL" in said[0]
    assert "3 restarts without a new checkpoint: gives up" in said[-1]


def test_a_new_checkpoint_makes_restarts_count_anew(supervise, monkeypatch):
    steps = iter([5, 5, 5, 6, 6, 6, 6])
    monkeypatch.setattr(supervisor, "newest", lambda run: next(steps))
    code, said, starts = supervise("tell(state='running', step=7); sys.exit(3)")
    assert (code, starts) == (3, 7)
    assert "the last checkpoint is step 6, 1 steps are made again; restart 1 in" in said[3]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("sys.exit(2)", 2),
        (f"sys.exit({cli.INTERRUPTED})", cli.INTERRUPTED),
        ("tell(state='failed', why='ValueError: no', step=None, retry=False); sys.exit(1)", 1),
        ("tell(state='done', step=9); os.abort()", 0),
    ],
    ids=["usage", "stopped", "permanent", "died after its end"],
)
def test_what_another_start_would_not_change_is_left(supervise, body, code):
    found, _, starts = supervise(body)
    assert (found, starts) == (code, 1)


def test_the_first_error_told_counts(supervise):
    _, said, starts = supervise(
        "tell(state='failed', why='first', step=1, retry=False)\n"
        "tell(state='failed', why='second', step=1, retry=True)\n"
        "sys.exit(1)"
    )
    assert starts == 1
    assert "first" in said[0]


def test_a_process_that_hangs_is_killed(supervise):
    code, said, starts = supervise(
        "tell(state='running', step=4, timeout=2.0, every=0.1)\nif start < 1: time.sleep(60)"
    )
    assert (code, starts) == (0, 2)
    assert "gave no sign of life for 2 s and was killed" in said[0]


def test_a_signal_is_passed_on_and_ends_the_restarts(supervise, tmp_path):
    def stop():
        while not (tmp_path / "0").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    code, said, starts = supervise(
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\ntime.sleep(60)"
    )
    assert (code, said, starts) == (cli.INTERRUPTED, [], 1)


def test_a_signal_while_waiting_ends_the_wait(tmp_path):
    command = [sys.executable, "-S", "-E", "-c", SCRIPT + "sys.exit(1)", str(tmp_path)]

    def say(message):  # that it waits for a minute
        os.kill(os.getpid(), signal.SIGTERM)

    assert supervisor.supervise(command, Restart(restart_delay=60.0), say) == cli.INTERRUPTED
    assert len(list(tmp_path.iterdir())) == 1


def test_a_killed_process_is_made_known_to_the_others(tmp_path, supervise):
    run = tmp_path.parent / "run"
    told = {"run": str(run), "attempt": 7, "count": 2, "index": 0, "step": 3}
    body = f"tell(state='running', **{told})\nif start == 0: os.kill(os.getpid(), signal.SIGKILL)"
    assert supervise(body)[0] == 0
    fault = watchdog.read(run, "fault.json")
    assert (fault["attempt"], fault["by"]) == (7, "the supervisor of process 0")
    assert "was killed by SIGKILL" in fault["why"]


@pytest.mark.parametrize(("ended", "how"), [(1, "code 1"), (-6, "SIGABRT")])
def test_a_process_that_jax_ended_is_explained_by_the_files_of_the_others(tmp_path, ended, how):
    told = {"run": str(tmp_path), "attempt": 7, "count": 3, "index": 1, "step": 3}
    told |= {"host": "h", "pid": 5, "doing": "training", "every": 0.05, "timeout": 1.0}
    beat = {"attempt": 7, "beat": 3, "host": "b", "pid": 6, "step": 2, "doing": "saving"}
    beat |= {"why": None, "retry": True}
    for index, state in ((0, "running"), (2, "stopped")):
        values = {**beat, "index": index, "state": state}
        watchdog.write(tmp_path, f"{index}.json", values)
    said = supervisor.why(End(ended, told))
    gone = "process 0 (host b, pid 6, step 2, saving) is gone"
    assert f"was ended by JAX with {how}: {gone}" in said
    supervisor._publish(End(ended, told | {"state": "running"}))
    assert watchdog.read(tmp_path, "fault.json") is None  # it is not the one to blame
    watchdog.write_fault(tmp_path, 7, "process 0", "process 0 was killed", True)
    assert supervisor.why(End(ended, told)).endswith("process 0 was killed")


def test_looking_for_checkpoints_leaves_the_devices_alone(tmp_path):
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    (tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp-1").mkdir()
    program = (
        "import sys\nfrom ldm_jax.train.run import supervisor\n"
        "from jax._src import xla_bridge\n"
        "print(supervisor.newest(sys.argv[1]), xla_bridge.backends_are_initialized())"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert found.stdout.split() == ["4", "False"]


@pytest.mark.parametrize(
    ("argv", "restart", "rest"),
    [
        ("tiny --steps 4", Restart(), "tiny --steps 4"),
        ("tiny --restart never --steps 4", Restart(), "tiny --steps 4"),
        ("--restart on-failure tiny", Restart("on-failure"), "tiny"),
        ("tiny --restart=on-failure --max-restarts 2", Restart("on-failure", 2), "tiny"),
        ("tiny --restart on-failure --a.b_c d_e --restart-delay=0.5 --steps -4 --debug",
         Restart("on-failure", 5, 0.5), "tiny --a.b_c d_e --steps -4 --debug"),
        ("encode tiny --distributed off --restart on-failure", Restart("on-failure"), None),
    ],
)  # fmt: skip
def test_the_child_gets_every_option_but_those_of_restarts(monkeypatch, argv, restart, rest):
    called = []
    monkeypatch.setattr(main, "train", lambda argv: called.append((argv, Restart())))
    monkeypatch.setattr(supervisor, "supervise", lambda c, r: called.append((c[3:], r)))
    main.restart_on_failure(argv.split())
    assert called == [((rest or "encode tiny --distributed off").split(), restart)]


@pytest.mark.parametrize(
    ("restart", "complaint"),
    [
        (Restart(max_restarts=3), "--max-restarts has no effect without --restart on-failure"),
        (Restart("on-failure", -1), "--max-restarts -1 is not a number from 0 on"),
        (Restart("on-failure", 5, -1.0), "--restart-delay -1.0 is not a number from 0 on"),
        (Restart("on-failure", 5, math.inf), "--restart-delay inf is not a number from 0 on"),
    ],
)
def test_options_that_cannot_be(restart, complaint):
    with pytest.raises(ValueError, match=complaint):
        supervisor.is_asked_for(restart)


@pytest.mark.parametrize(
    ("argv", "named"),
    [("--restart always", "on-failure"), ("--restart on-failure --max-restarts many", "many")],
)
def test_options_of_no_kind_are_wrong_usage(capsys, argv, named):
    with pytest.raises(SystemExit) as stopped:
        main.restart_on_failure(argv.split())
    assert stopped.value.code == supervisor.USAGE
    said = capsys.readouterr().err
    assert argv.split()[-2] in said
    assert named in said


def test_the_supervisor_speaks_and_leaves_the_devices_alone():
    program = (
        "import sys\nfrom jax._src import xla_bridge\n"
        "from ldm_jax.runtime import cli\nfrom ldm_jax.train import main\n"
        "def supervise(command, restart):\n"
        "    main.supervisor.say('restart 1')\n"
        "    print(xla_bridge.backends_are_initialized())\n"
        "main.supervisor.supervise = supervise\n"
        "cli.run('ldm-train', main.restart_on_failure, ['tiny', '--restart', 'on-failure'])"
    )
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert (found.stdout, found.stderr) == ("False\n", "ldm-train supervisor: restart 1\n")


def test_what_is_told_reaches_the_supervisor_and_a_lost_one_stops_the_run(monkeypatch):
    reader, writer = os.pipe()
    monkeypatch.setenv(watchdog.PIPE, str(writer))
    watchdog.adopt()
    assert watchdog.PIPE not in os.environ
    watchdog.tell(step=4)
    assert json.loads(os.read(reader, 1000)) == {"step": 4}
    os.close(reader)
    caught = []
    before = signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
    try:
        watchdog.tell(step=5)
        watchdog.tell(step=6)
    finally:
        signal.signal(signal.SIGTERM, before)
        os.close(writer)
    assert caught == [signal.SIGTERM]
