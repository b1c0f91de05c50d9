"""Metrics and pictures of a run, where they go and when."""

import dataclasses
import io
import json
import sys
import threading
import time

import numpy as np
import pytest
import tensorboard_file
from PIL import Image

from ldm_jax.configs import tiny
from ldm_jax.runtime import images, rundir
from ldm_jax.train.run import monitor, writers


@pytest.fixture
def run(tmp_path):
    return rundir.epath.Path(tmp_path)


def wait_for(done):
    until = time.monotonic() + 20
    while not done():
        assert time.monotonic() < until
        time.sleep(0.005)


def steps_of(run):
    return [line["step"] for line in rundir.read_metrics(run)]


def test_metrics_are_on_the_disk_before_anybody_saves(run, monkeypatch):
    monkeypatch.setattr(writers, "PACE", 0.0)
    metrics = writers.Metrics(run)
    for step in (10, 20, 30):
        metrics.scalars(step, {"loss": 1 / step})
        wait_for(lambda step=step: steps_of(run)[-1:] == [step])
    assert [path.name for path in (run / "metrics").iterdir()] == ["000010.jsonl"]
    metrics.flush()  # at a checkpoint: the next part
    metrics.scalars(40, {"loss": 0.0})
    metrics.close()
    assert steps_of(run) == [10, 20, 30, 40]
    assert {path.name for path in (run / "metrics").iterdir()} == {"000010.jsonl", "000040.jsonl"}
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == "metrics"])


def test_a_run_that_dies_resumes_without_what_it_had_written_too_much(run, monkeypatch):
    monkeypatch.setattr(writers, "PACE", 0.0)
    dead = writers.Metrics(run)
    for step in (1, 2):
        dead.scalars(step, {"loss": 0.5})
    dead.flush()  # checkpoint 2
    for step in (3, 4):
        dead.scalars(step, {"loss": 0.25})
    wait_for(lambda: steps_of(run) == [1, 2, 3, 4])
    dead.closed.set()
    dead.due.set()
    rundir.drop_metrics_after(run, 2)
    again = writers.Metrics(run)
    again.scalars(3, {"loss": 0.125})
    again.close()
    found = [(x["step"], x["loss"]) for x in rundir.read_metrics(run)]
    assert found == [(1, 0.5), (2, 0.5), (3, 0.125)]


def test_an_error_of_the_disk_is_raised_where_the_run_saves(run, monkeypatch):
    monkeypatch.setattr(writers, "PACE", 0.0)
    tried = []

    def full(path, records):
        tried.append(len(records))
        raise OSError(28, "No space left on device")

    write = rundir.write_metrics
    monkeypatch.setattr(rundir, "write_metrics", full)
    metrics = writers.Metrics(run)
    metrics.scalars(1, {"loss": 0.5})
    wait_for(lambda: tried)
    with pytest.raises(OSError, match="No space left"):
        metrics.flush()
    monkeypatch.setattr(rundir, "write_metrics", write)
    metrics.close()  # nothing is lost
    assert steps_of(run) == [1]


def test_parts_stay_small(run, monkeypatch):
    monkeypatch.setattr(writers, "LARGEST", 3)
    metrics = writers.Metrics(run)
    for step in range(1, 8):
        metrics.scalars(step, {"loss": 0.5})
    metrics.close()
    names = sorted(path.name for path in (run / "metrics").iterdir())
    assert names == ["000001.jsonl", "000004.jsonl", "000007.jsonl"]
    assert steps_of(run) == list(range(1, 8))


def test_tensorboard_shows_the_pictures(run):
    sheet = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    images.save_png(rundir.sample_path(run, 5), sheet)
    watch = monitor.Monitor(run, 0, 5, batch_size=1, beside=lambda: [writers.TensorBoard(run)])
    watch.picture(5, rundir.sample_path(run, 5))
    watch.close()
    shown = tensorboard_file.values(run)["samples", 5].image.encoded_image_string
    with Image.open(io.BytesIO(shown)) as image:
        np.testing.assert_array_equal(np.asarray(image), sheet)
    assert not (run / "metrics").exists()


FAKE = """
calls = []

class Run:
    def __init__(self, about): calls.append(("init", about))
    def define_metric(self, *names, **more): calls.append(("define", names, more))
    def log(self, values): calls.append(("log", values))
    def finish(self): calls.append(("finish",))

def init(**about): return Run(about)
def Image(pixels): return ("image", pixels.shape)
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """The calls of a module that is installed as wandb."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield lambda: sys.modules["wandb"].calls
    sys.modules.pop("wandb", None)


def test_wandb_gets_scalars_and_pictures_and_goes_on_in_the_same_run(run, wandb):
    config = dataclasses.replace(tiny.get_config("class"), wandb="flowers")
    writers.check(config)
    assert "wandb" not in sys.modules
    for _ in range(2):
        _, there = writers.beside_metrics(run, config)
        there.scalars(3, {"loss": 0.5})
        there.picture(3, "samples", np.zeros((4, 4, 1), np.uint8))
        there.close()
    name = json.loads((run / "wandb.json").read_text())["id"]
    first, second = wandb()[:5], wandb()[5:]
    assert first == second
    about = first[0][1]
    assert (about["project"], about["id"], about["resume"]) == ("flowers", name, "allow")
    assert about["config"]["batch_size"] == config.batch_size
    assert first[1:] == [
        ("define", ("*",), {"step_metric": "step"}),
        ("log", {"step": 3, "loss": 0.5}),
        ("log", {"step": 3, "samples": ("image", (4, 4))}),
        ("finish",),
    ]


def test_without_a_project_wandb_is_left_alone(run, wandb):
    writers.check(tiny.get_config("class"))
    assert len(writers.beside_metrics(run, tiny.get_config("class"))) == 1
    assert "wandb" not in sys.modules


def test_a_project_without_the_package_is_refused(monkeypatch):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    config = dataclasses.replace(tiny.get_config("class"), wandb="flowers")
    with pytest.raises(ValueError, match="--wandb flowers: wandb is not installed; pip install"):
        writers.check(config)
