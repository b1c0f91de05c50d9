"""`ldm-sample class2img` from end to end: files whose settings make the same image again."""

import functools

import numpy as np
import pytest
import task_models
from task_models import pixels

from ldm_jax.runtime import cli, images
from ldm_jax.sample import main

FAST = ["--batch-size", "4"]
sample = functools.partial(task_models.sample, "class2img")


@pytest.fixture(scope="module")
def made(ldm_run, tmp_path_factory):
    """A folder with 2 images of classes 3 and 1 each, their latents and arrays."""
    out = tmp_path_factory.mktemp("class2img") / "out"
    flags = ["--labels", 3, "triangle", "--num-images", 2, "--seed", 5, "--eta", 0.5]
    code = sample("--model", ldm_run, "--out", out, *flags, *FAST, "--npz", "--save-latents")
    assert code == 0
    return out


def test_files_names_and_arrays(made):
    names = ["00000_class3_seed5", "00001_class3_seed5", "00002_class1_seed5", "00003_class1_seed5"]
    files = {*(f"{name}.png" for name in names), "grid.png", "samples.npz", "latents.npy"}
    assert {f.name for f in made.iterdir()} == files
    with np.load(made / "samples.npz") as arrays:
        assert list(arrays) == ["arr_0"]
        singles = np.stack([pixels(made / f"{name}.png") for name in names])
        assert arrays["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(arrays["arr_0"], singles)
    latents = np.load(made / "latents.npy")
    assert (latents.shape, latents.dtype) == ((4, 8, 8, 4), np.float32)
    assert len({single.tobytes() for single in singles}) == 4
    grid = pixels(made / "grid.png")
    assert grid.shape[0] >= 2 * 48
    assert grid.shape[1] >= 2 * 48


def test_settings_in_the_png_make_the_image_again(made, ldm_run, tmp_path, capsys, shown):
    one = made / "00002_class1_seed5.png"
    kept = images.read_settings(one)
    assert (kept["index"], kept["label"], kept["task"]) == (2, 1, "class2img")
    assert (kept["labels"], kept["class"]) == ([1], "triangle")
    assert kept["model"] == str(ldm_run)
    assert main.sample(["again", str(one), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err.endswith(f"equal to {one}, pixel for pixel\n")
    assert [f.name for f in tmp_path.iterdir()] == [one.name]
    np.testing.assert_array_equal(pixels(tmp_path / one.name), pixels(one))
    assert images.read_settings(tmp_path / one.name) == kept


@pytest.mark.slow
def test_given_noise_replaces_the_seeded_one(ldm_run, made, tmp_path):
    x_T = np.random.default_rng(0).standard_normal((4, 8, 8, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x_T)
    flags = ["--labels", 3, 1, "--num-images", 2, *FAST, "--init-latents", tmp_path / "x.npy"]
    for seed in (0, 1):
        code = sample("--model", ldm_run, "--out", tmp_path / f"{seed}", "--seed", seed, *flags)
        assert code == 0
    first, second = (pixels(tmp_path / f"{s}" / f"00000_class3_seed{s}.png") for s in (0, 1))
    np.testing.assert_array_equal(first, second)
    assert np.any(first != pixels(made / "00000_class3_seed5.png"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--labels", 4], "--labels 4 is not in 0..3"),
        (["--labels", -1], "--labels -1 is not in 0..3"),
        (["--steps", 0], "--steps 0 is not in 1..1000"),
        (["--steps", 1001], "--steps 1001 is not in 1..1000"),
        (["--num-images", 0], "--num-images 0: give at least 1"),
        (["--batch-size", 6], "--batch-size 6 is not a multiple of 4 devices"),
        (["--step", 5], "has no step 5; it has"),
        (["--init-latents", "{tmp}/nothing.npy"], "nothing.npy"),
        (["--init-latents", "{tmp}/small.npy"], "holds (1, 8, 8, 4), needed is (16, 8, 8, 4)"),
        (["--out", "{made}"], "already holds images; --resume goes on with them; or give another"),
        (["--out", "{tmp}/small.npy"], "is a file; give a folder"),
        (["--out", "{tmp}/small.npy/below"], "cannot be made"),
        (["--model", "{tmp}"], "is not a run directory"),
        (["--model", "{tmp}/nowhere"], "nowhere: does not exist"),
        (["--model", "{first_stage}"], "is a first stage alone, which encodes and decodes"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(ldm_run, first_stage_run, made, tmp_path, capsys, flags, message):
    np.save(tmp_path / "small.npy", np.zeros((1, 8, 8, 4), np.float32))
    places = {"tmp": tmp_path, "made": made, "first_stage": first_stage_run}
    flags = [f.format(**places) if isinstance(f, str) else f for f in flags]
    before = {f: f.stat().st_mtime_ns for f in made.iterdir()}
    options = ["--model", ldm_run, "--out", tmp_path / "out"]
    assert sample(*options, *flags) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1, error
    assert message in error[0]
    assert error[0].startswith("ldm-sample: error: ")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    assert {f: f.stat().st_mtime_ns for f in made.iterdir()} == before


def test_an_unknown_task_is_refused(capsys):
    assert cli.run("ldm-sample", main.sample, ["teleport"]) == 1
    error = capsys.readouterr().err
    assert "task 'teleport' is not one of " in error
    assert all(task in error for task in main.TASKS)
