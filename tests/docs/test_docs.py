"""The scripts of docs/ run as they are, on the tiny config."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import text_model
from PIL import Image

import ldm_jax
from ldm_jax import sampling, saving, schema
from ldm_jax.configs import tiny
from ldm_jax.runtime import checkpoint, rundir

DOCS = Path(__file__).parents[2] / "docs"

pytestmark = pytest.mark.usefixtures("quick_compilation")


def script(name: str):
    """A file of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(quick_compilation, first_stage_run, tmp_path_factory) -> Path:
    """The run of docs/train_multihost.py on four devices, stopped after a step and resumed."""
    base, run = tiny.get_config("class"), tmp_path_factory.mktemp("docs") / "run"
    config = dataclasses.replace(
        base,
        first_stage=schema.FirstStageConfig(path=str(first_stage_run), scale_images=16),
        unet=dataclasses.replace(base.unet, channel_mult=(1,)),
        max_to_keep=3,
    )
    train = script("train_multihost").train
    train(dataclasses.replace(config, steps=1), str(run))
    assert checkpoint.saved_steps(run) == [1]
    train(dataclasses.replace(config, steps=5), str(run))
    return run


def test_training_script_resumes_and_saves(trained):
    assert checkpoint.saved_steps(trained) == [1, 4, 5]
    assert rundir.read_config(trained).steps == 5
    kernels = [
        checkpoint.restore_parts(trained, step, ["params"])["params"]["unet"]["conv_in"]["kernel"]
        for step in (1, 5)
    ]
    assert 1e-4 < np.abs(kernels[1] - kernels[0]).max() < 0.1


def test_sampling_script_draws_every_label(trained, tmp_path):
    script("sample").main(str(trained), str(tmp_path / "a.png"), "3", "1", steps=4)
    script("sample").main(str(trained), str(tmp_path / "b.png"), "3", "0", steps=4)
    a, b = (np.asarray(Image.open(tmp_path / f"{name}.png"), int) for name in "ab")
    side = ldm_jax.load(trained).config.size
    assert a.shape == b.shape == (side + 4, 2 * (side + 2) + 2, 3)
    first, second = a[:, : side + 2], a[:, side + 2 : 2 * side + 4]
    assert np.abs(first - b[:, : side + 2]).max() == 0  # a picture has its own label and key
    assert np.abs(first - second).max() > 1


def test_slant_of_a_line():
    y, x = np.mgrid[:32, :32]
    ink = np.exp(-((x - 16 + np.array([0.5, 0, -0.25])[:, None, None] * (y - 16)) ** 2) / 4)
    slants = script("guide_digits").slant(2 * ink[..., None] - 1)
    np.testing.assert_allclose(slants, [0.5, 0, -0.25], atol=0.02)


@pytest.mark.slow
def test_guiding_script_moves_every_picture_to_its_goal(trained):
    guide = script("guide_digits")
    model = ldm_jax.load(trained)
    goals, keys = np.array([0.3, -0.3]), sampling.keys_of(0, range(2))
    before, after = guide.guide(model, [3, 1], goals, keys, steps=4, updates=4)
    moved = np.asarray(guide.slant(after) - guide.slant(before))
    assert moved[0] > 0.01 > -0.01 > moved[1]


@pytest.mark.parametrize(
    ("name", "most"), [("train_multihost", 60), ("sample", 25), ("guide_digits", 85)]
)
def test_scripts_are_short(name, most):
    assert len((DOCS / f"{name}.py").read_text().splitlines()) <= most


def test_the_page_on_python_runs_as_it_is(tmp_path, monkeypatch):
    saving.save(text_model.make(), tmp_path / "runs" / "text")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL)
    found: dict = {}
    exec("\n".join(blocks), found)
    assert found["images"].shape[0] == 4  # devices of the tests
    known = found["filled"] - found["changed"]
    assert np.isfinite(known).all()
    assert np.abs(known).max() > 0
    assert found["image"].shape == (1, 16, 16, 3)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("runs", "copy.safetensors", "copy.yaml")
    }
