"""One line that says how far a command is, whatever it is written to."""

import re
import sys
import time

import pytest
from terminal import screen

from ldm_jax.runtime import log, progress
from ldm_jax.runtime.log import LOG


@pytest.fixture
def watched(monkeypatch):
    """stderr is a terminal."""
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    monkeypatch.setattr(progress, "TICK", 0.01)


def test_a_terminal_has_one_bar_below_whole_lines(watched, capsys):
    with log.shown(), progress.Bar(8, unit="step", does="training", initial=2) as bar:
        LOG.info("a line")
        for _ in range(3):
            bar.update()
        bar.note("loss 0.5000")
        bar.refresh()
        LOG.info("another line, which is longer than the bar is " + "wide " * 40)
    *lines, shown, end = screen(capsys.readouterr().err)
    assert [line.partition(",")[0] for line in lines] == ["a line", "another line"]
    assert re.fullmatch(
        r"training: +62%\|.+\| 5/8 \[00:00<00:00, +[\d.]+step/s, loss 0\.5000\]", shown
    )
    assert end == ""


def test_a_pause_shows_what_is_done_and_for_how_long(watched, capsys):
    with progress.Bar(8, unit="step", does="training") as bar:
        bar.update(4)
        time.sleep(0.05)
        with bar.doing("evaluating"):
            time.sleep(0.1)
        bar.refresh()
        rate = bar.drawn.format_dict["elapsed"]
        shown = capsys.readouterr().err
        seen = [screen(part)[0].partition(":")[0] for part in shown.split("\r") if part]
    assert rate < 0.1  # the pause is not in it
    assert seen[0] == seen[-1] == "training"
    assert {"evaluating", "evaluating 0 s"} & set(seen)
    assert set(seen) <= {"", "training", "evaluating", "evaluating 0 s"}
    assert len(screen(shown)) == 1


def test_a_file_gets_plain_lines_at_a_calm_pace(capsys, monkeypatch):
    with log.shown(), progress.Bar(100, unit="step", does="training") as bar:
        for i in range(50):
            bar.update()
            with bar.doing("saving"):
                LOG.info(f"line {i}")
        monkeypatch.setattr(bar.drawn, "mininterval", 0)
        bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:50] == [f"line {i}" for i in range(50)]
    assert all(line.startswith("training: 51/100 [00:00<00:00, ") for line in lines[50:])
    assert 1 <= len(lines[50:]) <= 2
    assert not any("\r" in line or "\x1b" in line or "|" in line for line in lines)


def test_a_hidden_bar_draws_nothing(watched, capsys):
    with progress.Bar(2, unit="image", does="sampling", hidden=True) as bar, bar.doing("saving"):
        bar.update(2)
        bar.refresh()
    assert capsys.readouterr().err == ""


def test_an_error_begins_a_line_of_its_own(watched, capsys):
    bar = progress.Bar(2, unit="image", does="sampling")
    bar.update()
    progress.close_all()
    sys.stderr.write("error: no\n")
    shown, error, _ = screen(capsys.readouterr().err)
    assert shown.startswith("sampling:  50%|")
    assert error == "error: no"


def test_a_step_of_seconds_still_counts_in_steps_per_second():
    line = progress.auto.tqdm.format_meter(
        5, 10, 20.0, unit="step", bar_format=progress.BAR, postfix="loss 1.0000", ncols=100
    )
    assert line.endswith("[00:20<00:20,  0.25step/s, loss 1.0000]")
