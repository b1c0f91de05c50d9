"""Files that runs, packs and caches keep for themselves are read like those of others."""

import os
from unittest import mock

import pytest

from ldm_jax.data import cache, metadata
from ldm_jax.runtime import checkpoint, rundir
from ldm_jax.train.prepare import shards
from ldm_jax.train.run import loop, watchdog

OWN = {  # readers of the files that a run keeps for itself
    "config.json": lambda run: rundir.read_config(run),
    "data.json": lambda run: rundir.read_data(run),
    "latents.json": lambda run: rundir.read_latents(run),
    "metrics/000001.jsonl": lambda run: rundir.read_metrics(run),
    "processes/0.json": lambda run: watchdog.read(run, "0.json"),
    "processes/fault.json": lambda run: watchdog.read(run, "fault.json"),
    "train-0.json": lambda run: shards.read(run, cache.Shard("train-0.x", 0, 1)),
    "cache.json": lambda run: cache.peek(run),
    "a/metadata.jsonl": lambda run: metadata.captions(run, ["a.png"], ["a/metadata.jsonl"]),
}
KNOWS_NOTHING = '{"a": 1}'
ODD = ("[1]", KNOWS_NOTHING, '{"step": ' + "[" * 100_000, "x")


@pytest.mark.parametrize("file", OWN)
def test_files_of_a_run_are_read_in_bounds(tmp_path, file):
    """Whatever lies there: the watch, which reads while others write, then finds nothing."""
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    for content in (None, *ODD):
        if content is not None:
            path.unlink(missing_ok=True)
            path.write_text(content)
        if file.startswith("processes"):
            assert OWN[file](tmp_path) is None
        elif not (file.startswith("train-") and content == KNOWS_NOTHING):
            with pytest.raises(ValueError, match=f"^{path}:"):
                OWN[file](tmp_path)


@pytest.mark.parametrize("clock", [{"wall_s": "x"}, {"time": float("nan")}, {"trained_s": -1}, {}])
def test_the_clock_of_a_checkpoint_is_looked_at(tmp_path, monkeypatch, clock):
    good = {"trained_s": 1, "wall_s": 2, "time": 3, "orderly": True}
    manager = mock.Mock(directory=tmp_path)
    (tmp_path / "4").mkdir()
    kept = good | clock if clock else []
    monkeypatch.setattr(checkpoint, "read_meta", lambda folder: {"clock": kept})
    with pytest.raises(ValueError, match=f"^{tmp_path}/4: .*; give another step"):
        loop._spent(manager, 4)
    kept = good
    assert loop._spent(manager, 4) == good
