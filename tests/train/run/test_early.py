"""Signals before the first step: in imports, start-up and compilation; in their own processes."""

import os
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


def run(code, **options):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **options
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
