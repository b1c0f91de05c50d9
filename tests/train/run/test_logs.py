"""Logs of a run: every process keeps its records, in whole parts."""

import logging
import re
import threading
import warnings

import jax
import pytest

from ldm_jax.runtime import cli, log
from ldm_jax.runtime.log import LOG
from ldm_jax.train.run import logs

OTHER = logging.getLogger("somebody.else")


def parts(run, process=0):
    """The parts of a process, in order; drafts go and come beside them while a run writes."""
    return [path.read_text() for path in sorted((run / f"logs/{process:04d}").glob("*.log"))]


@pytest.fixture
def second(monkeypatch):
    """This is process 1 of two."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)


def test_lines_warnings_and_errors_go_to_the_run(tmp_path, capsys):
    with log.shown(), logs.kept():
        LOG.info("before the run is known")
        assert parts(tmp_path) == []
        logs.begin(logs.epath.Path(tmp_path))
        OTHER.warning("odd")
        OTHER.info("detail")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old", UserWarning, stacklevel=1)
        thread = threading.Thread(target=lambda: 1 / 0, name="reader")
        thread.start()
        thread.join()
    (text,) = parts(tmp_path)
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ INFO ldm_jax: before the run", text)
    assert "WARNING somebody.else: odd" in text
    assert "detail" not in text
    assert "UserWarning: old" in text
    assert "error in thread reader\nTraceback" in text
    assert "ZeroDivisionError" in text
    said = capsys.readouterr().err
    assert said.startswith("before the run is known\nodd\n")
    assert "UserWarning: old" in said
    assert not [h for h in logging.getLogger().handlers if isinstance(h, logs.RunLog)]


def test_another_process_is_silent_but_for_errors_with_its_number(tmp_path, capsys, second):
    def fail(argv):
        with logs.kept():
            logs.begin(logs.epath.Path(tmp_path))
            LOG.info("a fact")
            LOG.info("a detail", extra=log.ONLY_FILE)
            OTHER.warning("odd")
            OTHER.error("wrong")
            raise ValueError("no such file")

    assert cli.run("ldm-train", fail, []) == 1
    said = capsys.readouterr().err
    assert said == "process 1: wrong\nprocess 1: ldm-train: error: no such file\n"
    (text,) = parts(tmp_path, 1)
    assert "INFO ldm_jax: a fact" in text
    assert "INFO ldm_jax: a detail" in text
    assert "stopped by an error\nTraceback" in text
    assert "ValueError: no such file" in text


def test_every_start_and_every_64_kib_get_a_new_part(tmp_path):
    for start in range(2):
        with logs.kept():
            logs.begin(logs.epath.Path(tmp_path))
            LOG.info(f"start {start}")
            logs.flush()
            LOG.info("x" * logs.LARGEST)
            logs.flush()
            LOG.info("end")
    found = parts(tmp_path)
    assert [text.count("\n") for text in found] == [2, 1, 2, 1]
    assert ["start 1" in text for text in found] == [False, False, True, False]
    assert sorted(p.name for p in (tmp_path / "logs/0000").iterdir())[-1] == "000004.log"


def test_a_run_that_was_never_opened_gets_no_log(tmp_path):
    with pytest.raises(ValueError), logs.kept():
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_lines_are_written_while_the_main_thread_stands_still(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "SECONDS", 0.01)
    with logs.kept():
        logs.begin(logs.epath.Path(tmp_path))
        LOG.info("still here")
        found = threading.Event()
        for _ in range(500):
            if parts(tmp_path) and "still here" in parts(tmp_path)[-1]:
                found.set()
                break
            threading.Event().wait(0.01)
        assert found.is_set()
