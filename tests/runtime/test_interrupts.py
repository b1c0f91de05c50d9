"""Ctrl-C: the answer comes while the main thread is busy outside Python."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ldm_jax.runtime import interrupts

# PBKDF2 in C stands for a compiler: no handler of Python runs before its end
BUSY = """
import hashlib, sys, threading
from ldm_jax.runtime import cli

def command(argv):
    threading.Timer(0.5, print, ("begun",), {"flush": True}).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

sys.exit(cli.run("ldm-test", command, sys.argv[1:]))
"""


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(interrupts.LOG, "info", lines.append)
    return lines


def wait_for(done):
    until = time.monotonic() + 20
    while not done():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_each_ctrl_c_has_its_line_and_one_more_leaves(said):
    left, before = [], signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with interrupts.answered("first", "second", leave=left.append):
            for expected in (["first"], ["first", "second"]):
                os.kill(os.getpid(), signal.SIGINT)
                wait_for(lambda expected=expected: said == expected)
            assert left == []
            os.kill(os.getpid(), signal.SIGINT)
            wait_for(lambda: left == [130])
    finally:
        signal.signal(signal.SIGINT, before)
    assert said == ["first", "second"]
    assert not [t for t in threading.enumerate() if t.name == "interrupts"]


def test_other_signals_have_no_line(said):
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with interrupts.answered("first"):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert said == []


def test_what_ends_in_time_needs_no_line(said):
    def interrupted():
        with interrupts.answered("first", after=30.0):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert said == []


def test_the_inner_answer_counts(said):
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with interrupts.answered("outer"):
            with interrupts.answered("inner"):
                os.kill(os.getpid(), signal.SIGINT)
                wait_for(lambda: said)
            os.kill(os.getpid(), signal.SIGINT)
            wait_for(lambda: len(said) == 2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert said == ["inner", "outer"]


def test_another_thread_takes_no_signals(said):
    def work():
        with interrupts.answered("first"):
            entered.append(True)

    entered = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [True]


def test_a_command_answers_while_it_is_busy_outside_python():
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline().startswith("interrupted: ends when what is being compiled")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == interrupts.CODE
    finally:
        process.kill()
        process.communicate()
