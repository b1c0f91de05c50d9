"""Log of the library: silent for its users, on stderr from process 0 inside a command."""

import logging
import subprocess
import sys

import jax
import pytest
import tqdm

from ldm_jax.runtime import log
from ldm_jax.runtime.log import LOG

OTHER = logging.getLogger("somebody.else")


def test_messages_alone_are_shown_inside(capsys):
    LOG.warning("before")
    with log.shown():
        LOG.info("50 % done")
        logging.getLogger("ldm_jax.part").info("a child")
        LOG.debug("detail")
        LOG.info("for the file", extra=log.ONLY_FILE)
        OTHER.info("another library")
        OTHER.warning("odd")
    LOG.warning("after")
    assert capsys.readouterr().err == "50 % done\na child\nodd\n"


def test_it_is_shown_once_however_often_it_is_entered(capsys):
    with log.shown():
        with log.shown():
            LOG.info("inner")
        LOG.info("outer")
    assert capsys.readouterr().err == "inner\nouter\n"


def test_devices_are_not_asked_for_before_processes_are_joined(capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: pytest.fail("asks for devices"))
    with log.shown():
        LOG.info("early")
    assert capsys.readouterr().err == "early\n"


def test_handlers_and_the_level_come_back(capsys):
    root, plain = logging.getLogger(), logging.StreamHandler()
    root.addHandler(plain)  # as the import of Orbax does
    try:
        with log.shown():
            assert plain not in root.handlers
            assert LOG.level == logging.INFO
        assert plain in root.handlers
        assert LOG.level == logging.NOTSET
        assert not [h for h in root.handlers if isinstance(h, log.Terminal)]
    finally:
        root.removeHandler(plain)


def test_a_bar_makes_room_and_is_drawn_again(capsys):
    with log.shown(), tqdm.tqdm(total=4, ncols=40, mininterval=0) as bar:
        bar.update(1)
        capsys.readouterr()
        LOG.info("a line")
        blank, rest = capsys.readouterr().err.split("a line\n")
        assert blank.strip("\r ") == ""
        assert len(blank) > 30
        assert "1/4" in rest


LIBRARY = """
import sys
import ldm_jax
import ldm_jax.loading
from ldm_jax.runtime.log import LOG
model = ldm_jax.load(sys.argv[1])
LOG.info("a fact")
"""


def test_a_user_of_the_library_sees_nothing(ldm_run):
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY, str(ldm_run)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
