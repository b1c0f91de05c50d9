"""Signals before the first step: in imports, start-up and compilation; in their own processes."""

import os
import socket
import subprocess
import sys

import pytest

WAITS = """
import os, signal, sys, time
from ldm_jax.train.run import early
assert "jax" not in sys.modules  # it stands before what takes seconds to import
early.install()
os.kill(os.getpid(), signal.{name})
{then}
"""


def run(code, argument="", **options):
    return subprocess.run(
        [sys.executable, "-c", code, argument],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_with_the_code_that_says_start_again(name):
    done = run(WAITS.format(name=name, then="time.sleep(100)"))
    assert done.returncode == 75
    assert done.stderr == f"ldm-train: stopped by {name} before its first step\n"


def test_a_main_thread_that_is_busy_in_c_is_ended_too():
    """As it compiles: Python's own handler would wait for it."""
    code = """
import ctypes, os, signal, threading, time
from ldm_jax.runtime import interrupts
from ldm_jax.train.run import early
early.install()
watch = interrupts.answered("stopping")  # as every command has it
watch.__enter__()
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
end = time.monotonic() + 60
while (left := end - time.monotonic()) > 0:
    ctypes.CDLL(None).usleep(int(left * 1e6))
"""
    assert run(code).returncode == 75


JOINED = """
import os, signal, sys, time
from ldm_jax.train.run import early
early.install()
import jax
jax.distributed.initialize(sys.argv[1], 1, 0)
early.install_again()
"""


@pytest.mark.parametrize("loop_begins", [False, True])
def test_a_process_that_has_joined_others(loop_begins):
    """JAX then has SIGTERM for itself, and would note it for a loop that has not begun."""
    code = JOINED
    if loop_begins:
        code += "from jax.experimental import multihost_utils\nearly.hand_over()\n"
    code += "os.kill(os.getpid(), signal.SIGTERM)\n"
    if loop_begins:
        code += (
            "for step in range(600):\n"
            "    time.sleep(0.05)\n"
            "    if multihost_utils.reached_preemption_sync_point(step): os._exit(5)\n"
        )
    code += "time.sleep(20)\n"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    done = run(code, env={**os.environ, "JAX_PLATFORMS": "cpu"}, argument=address)
    assert done.returncode == (5 if loop_begins else 75), done.stderr


def test_what_nohup_ignores_stays_ignored():
    code = WAITS.format(name="SIGHUP", then="print('goes on')")
    done = run("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)" + code)
    assert (done.returncode, done.stdout) == (0, "goes on\n")


def test_other_handlers_take_over():
    then = "time.sleep(0.5); print('saved')"
    code = WAITS.format(name="SIGTERM", then=then).replace(
        "os.kill", "signal.signal(signal.SIGTERM, lambda *_: None)\nos.kill"
    )
    assert run(code).stdout == "saved\n"


def test_a_command_that_failed_leaves_though_threads_remain():
    """As those of Orbax, when two trainers write into one run without a watch."""
    code = """
import sys, threading, time
from ldm_jax.train import main
threading.Thread(target=time.sleep, args=(10**6,)).start()
sys.argv = ["ldm-train", "no_such_config"]
main.main()
"""
    done = run(code, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 1
    assert done.stderr.startswith("ldm-train: error: ")
