"""`ldm-sample plot`: values of axes, and a sheet of pictures that are text2img's own."""

import numpy as np
import pytest
import task_models
import text_model
from task_models import pixels

from ldm_jax import saving
from ldm_jax.runtime import images
from ldm_jax.sample import plot, text2img


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plot") / "run"
    saving.save(text_model.make(), folder, to="ldm_jax")
    return folder


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("7", int, [7]),
        ("1-5", int, [1, 2, 3, 4, 5]),
        ("1-5 (+2)", int, [1, 3, 5]),
        ("10-5 (-3)", int, [10, 7]),
        ("3-1", int, [3, 2, 1]),
        ("1-10 [5]", int, [1, 3, 5, 7, 10]),
        ("1-3 (+0.5)", float, [1.0, 1.5, 2.0, 2.5, 3.0]),
        ("0.0-1.0 [6]", float, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ("-1--3", int, [-1, -2, -3]),
    ],
)
def test_numbers(text, kind, expected):
    found = plot.numbers(text, kind)
    assert found == pytest.approx(expected)
    assert {type(x) for x in found} == {kind}


def test_values_change_the_options():
    options = text2img.Options("", "", prompt=("a red fox",), negative_prompt="red, dog")
    for text, field, expected in (
        ("Sampler: Euler a, dpmpp_2m", "solver", ["euler_ancestral", "dpmpp_2m"]),
        ("Schedule type: Karras", "spacing", ["karras"]),
        ("CFG Scale: 1-2", "guidance_scale", [1.0, 2.0]),
        ('Prompt S/R: red, "a, b"', "prompt", [("a red fox",), ("a a, b fox",)]),
        ('prompt: red, "a, b"', "negative_prompt", ["red, dog", "a, b, dog"]),
        ("size: 512x768", "width", [512]),
        ("size: 512x768", "height", [768]),
        ("clip skip: 2", "clip_skip", [2]),
    ):
        found = [getattr(v.change(options), field) for v in plot.values_of("across", text)]
        assert found == expected


def test_a_sheet_of_pictures_that_are_repeated(run, tmp_path, capsys, shown):
    flags = ["--model", run, "--prompt", "a red disc", "--batch-size", 4, "--hires-scale", 2]
    flags += ["--across", "cfg: 1-5 [3]", "--down", "seed: 3, 7", "--sheets", "prompt: red, blue"]
    assert task_models.sample("plot", *flags, "--out", tmp_path / "out") == 0
    assert capsys.readouterr().err.count("compiling the sampler") == 2  # of the two passes
    paths = sorted((tmp_path / "out").glob("0*.png"))
    assert len(paths) == 12
    assert paths[4].name == "00004_red_seed_7_cfg_3_seed7.png"
    kept = images.read_settings(paths[4])
    assert (kept["task"], kept["seed"], kept["guidance_scale"]) == ("text2img", 7, 3.0)
    assert task_models.again(paths[4], "--out", tmp_path / "again") == 0
    assert capsys.readouterr().err.endswith("pixel for pixel\n")
    top = pixels(tmp_path / "out" / "grid_0.png")
    scale, left = 3, top.shape[1] - 3 * 98
    assert top.shape[0] == 16 + 2 * 98
    cell = top[16 + 98 : 16 + 98 + 96 : scale, left + 98 : left + 98 + 96 : scale]
    np.testing.assert_array_equal(cell, pixels(paths[4]))
    assert not (tmp_path / "out" / "grid.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], 'give --across "NAME: VALUES", --down or --sheets'),
        (["--across", "colour: 1"], "--across 'colour: 1': give \"NAME: VALUES\" of seed, steps"),
        (["--across", "steps: 1, x"], "--across 'steps: 1, x': invalid literal"),
        (["--across", "steps:"], "--across 'steps:': names no value"),
        (["--across", "steps: 1-1000"], "1-1000: 1000 values, 400 at most"),
        (["--across", "seed: 1-30", "--down", "cfg: 1-30"], "make 900 images, 400 at most"),
        (["--across", "prompt: cat, dog"], "'cat' is not in the prompts, and cannot be replaced"),
        (["--across", "denoising: 0.5, 0.7"], "denoising is that of a hires fix"),
        (["--across", "sampler: ddim, abacus"], "'abacus' is not one of"),
        (["--across", "size: 16, 24"], "16: give WIDTHxHEIGHT"),
        (["--across", "steps: 1-3 (-1)"], "does not lead from 1 to 3"),
        (["--across", "steps: 1, 2", "--resume"], "--resume is not for a plot"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(run, tmp_path, capsys, flags, message):
    flags = ["--model", run, "--out", tmp_path / "out", "--prompt", "red", *flags]
    task_models.assert_one_line("plot", capsys, message, *flags)
