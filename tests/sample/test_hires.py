"""A second pass at a larger size: what it begins with, which steps run, and which image is kept."""

import functools

import numpy as np
import pytest
import task_models
import text_model
from PIL import Image
from task_models import pixels

from ldm_jax import saving
from ldm_jax.runtime import images
from ldm_jax.sample import generate, hires, text2img

sample = functools.partial(task_models.sample, "text2img")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return text_model.make(text_model.clip_tokenizer(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hires") / "run"
    saving.save(model, folder, to="ldm_jax")
    return folder


def asked(run, **given):
    """The request of three images of 16x12, two of them in a call."""
    given = {"prompt": ("red",), "num_images": 3, "batch_size": 4, "width": 12, **given}
    return text2img.request(text2img.Options(str(run), "out", **given))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"hires_scale": 1.5}, ((12, 9), (12, 9))),
        ({"hires_scale": 1.2}, ((9, 7), (9, 7))),  # rounded down
        ({"hires_size": (32, 0)}, ((16, 12), (16, 12))),
        ({"hires_size": (0, 24)}, ((16, 12), (16, 12))),
        ({"hires_size": (32, 18)}, ((16, 9), (16, 12))),
        ({"hires_size": (20, 24)}, ((10, 12), (16, 12))),
    ],
)
def test_the_larger_size(model, size, expected):
    options = text2img.Options("", "", **size)
    shape, cover = hires.sizes(model, options, (8, 6, 4))
    assert (shape, cover) == ((*expected[0], 4), expected[1])


@pytest.mark.parametrize(
    ("given", "levels", "start"),
    [
        ({}, 14, 4),  # the last 10 of int(10 / 0.7)
        ({"hires_steps": 5, "hires_strength": 0.5}, 10, 5),
        ({"hires_strength": 1.0}, 10, 0),
        ({"hires_strength": 0.0}, 10, 10),
        ({"spacing": "leading", "steps": 30, "hires_strength": 1.0}, 31, 0),
    ],
)
def test_the_steps_that_run(run, given, levels, start):
    given = {"steps": 10, "spacing": "trailing", "hires_scale": 2.0, **given}
    second = asked(run, **given).second.request
    assert (len(generate.levels_of(second).t), second.start) == (levels, start)


def test_schedules_of_a_prompt_go_on_in_the_second_pass(run):
    given = {"steps": 10, "spacing": "trailing", "prompt_syntax": "webui", "num_images": 1}
    given |= {"hires_scale": 2.0, "hires_steps": 6}
    for prompt, texts in (("[red:blue:0.5]", 1), ("[red:blue:1.5]", 2), ("[red:blue:13]", 2)):
        first = asked(run, prompt=(prompt,), **given)
        steps = first.second.request.batch["steps"][0, 0]
        assert len(steps) == 6
        assert steps.tolist() == ([0] * 6 if texts == 1 else [0, 0, 0, 0, 1, 1])
        assert first.batch["steps"].shape[2] == 10


@pytest.mark.slow
def test_without_steps_the_image_is_enlarged_alone(run, model, tmp_path, capsys, shown):
    flags = ["--model", run, "--prompt", "red", "--num-images", 3, "--width", 12]
    flags += ["--batch-size", 4, "--save-latents", "--npz"]
    assert sample(*flags, "--out", tmp_path / "small") == 0
    flags += ["--hires-scale", 2, "--hires-strength", 0, "--hires-upscaler", "latent-nearest"]
    assert sample(*flags, "--out", tmp_path / "large", "--preview", 1) == 0
    small, large = (np.load(tmp_path / name / "latents.npy") for name in ("small", "large"))
    np.testing.assert_allclose(large, small.repeat(2, 1).repeat(2, 2), atol=1e-5)
    (name, *_) = sorted(path.name for path in (tmp_path / "large").glob("0*.png"))
    picture = images.to_uint8(np.asarray(model.decode(model.latent_scale * large[:1])))[0]
    assert np.abs(pixels(tmp_path / "large" / name) - picture).max() <= 1
    assert pixels(tmp_path / "large" / "previews" / name).shape == (36, 28, 3)


def test_both_passes_have_one_program_and_an_image_is_repeated(run, tmp_path, capsys, shown):
    flags = ["--model", run, "--prompt", "red", "(blue:1.3)", "--prompt-syntax", "webui"]
    flags += ["--num-images", 3, "--batch-size", 4, "--noise-source", "nv"]
    flags += ["--hires-scale", 2, "--hires-upscaler", "lanczos"]
    assert sample(*flags, "--out", tmp_path / "out", "--progress", "steps") == 0
    said = capsys.readouterr().err
    assert said.count("compiling the sampler") == 2
    assert "sampling: 8/8" in said  # two calls of 2 and 2 levels
    paths = sorted((tmp_path / "out").glob("0*.png"))
    assert len({pixels(path).tobytes() for path in paths}) == 6
    assert pixels(paths[0]).shape == (32, 32, 3)
    text = images.read_info(paths[4])["parameters"]
    assert ", Size: 16x16," in text
    assert ", Denoising strength: 0.7, RNG: NV, Hires upscale: 2, Hires upscaler: Lanczos," in text
    assert task_models.again(paths[4], "--out", tmp_path / "again") == 0
    assert capsys.readouterr().err.endswith("pixel for pixel\n")
    assert sample(*flags, "--out", tmp_path / "out", "--resume") == 0


def test_pixels_are_enlarged_as_by_pillow(run):
    """And what is not finite stays so, to be said."""
    first = asked(run, hires_size=(32, 20), hires_upscaler="lanczos")
    image = np.random.default_rng(0).uniform(-1, 1, (2, 16, 12, 3)).astype(np.float32)
    image[0, 0, 0, 0] = np.nan
    init = first.second.feed(image, np.zeros(0))["init"]
    assert not np.isfinite(init[0]).any()
    whole = Image.fromarray(images.to_uint8(image[1])).resize((24, 32), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(images.to_uint8(init[1]), np.asarray(whole)[:, 2:22])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--hires-scale 0.5", "--hires-scale 0.5 is not a finite number of at least 1"),
        ("--hires-size 32 0 --hires-scale 2", "--hires-scale and --hires-size both give the size"),
        ("--hires-size 0 0", "--hires-size 0 0: give pixels"),
        ("--hires-size 33 32", "--hires-size: height 33 is not a multiple of 2"),
        ("--hires-scale 2 --hires-steps -1", "--hires-steps -1: give 0 or more"),
        ("--hires-scale 2 --hires-strength 1.5", "--hires-strength 1.5 is not in 0..1"),
        ("--hires-scale 2 --hires-strength 0.001", "2 steps are part of 2000, and the model has"),
        ("--hires-scale 2 --export x.bin", "--export is for one program, and a hires fix has two"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, flags, message):
    flags = ["--model", run, "--out", tmp_path / "out", "--prompt", "x", *flags.split()]
    task_models.assert_one_line("text2img", capsys, message, *flags)


def test_what_changes_changes_in_both_passes(run):
    what = asked(run, hires_scale=2.0).replaced(guided=False, indices=np.array([4, 5, 6]))
    for one in generate.passes_of(what):
        assert (one.guided, one.indices.tolist()) == (False, [4, 5, 6])
