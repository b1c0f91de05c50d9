"""From a plan to arrays: what overlaps, is donated, is shown on the way, or comes from a file."""

import contextlib
import dataclasses
import types

import jax
import numpy as np
import pytest
import task_models
from task_models import again, assert_one_line, pixels, sample

from ldm_jax import export, noise, schema
from ldm_jax.runtime import images
from ldm_jax.sample import draw, generate, img2img, program, progress, request
from ldm_jax.sample.options import Options


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model of four classes as a run."""
    cond = schema.ClassCondConfig(num_classes=4, via="label")
    model = task_models.make(cond, num_classes=5)
    return task_models.save(model, tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "photo.png"
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    images.save_png(path, picture)
    return path


@pytest.fixture(scope="module")
def what(run, photo):
    """The plan of two images from a photo, of which two of four levels run."""
    flags = {"steps": 4, "strength": 0.5, "labels": (1, 3), "images": (str(photo),)}
    return img2img.request(img2img.Options(model=str(run), out="", **flags))


def test_what_an_image_starts_from_is_donated(what):
    (call,) = request.calls_of(what)
    arguments = generate.arguments_of(what, generate.batch_of(what), call)
    run = program.compiled(what, program.program_of(what, what.model), arguments)
    assert set(arguments[1]) == {"init"}
    image, _ = run(*arguments)
    assert arguments[1]["init"].is_deleted()
    assert image.shape == (4, 16, 16, 3)


def test_steps_are_reported_and_change_nothing(what, monkeypatch, capsys, shown):
    (plain,) = generate.made(what)
    ticks, bars = [], progress.bars

    @contextlib.contextmanager
    def counted(*arguments):
        with bars(*arguments) as shown:
            yield shown._replace(step=lambda: ticks.append(shown.step()))

    monkeypatch.setattr(progress, "bars", counted)
    steps = dataclasses.replace(what.options, progress="steps")
    (told,) = generate.made(dataclasses.replace(what, options=steps))
    jax.effects_barrier()
    assert len(ticks) == 4
    np.testing.assert_array_equal(told.image, plain.image)
    said = capsys.readouterr().err
    assert "not kept for the next time: --progress images is" in said
    (*_, last) = [line for line in said.splitlines() if line.startswith("sampling: 4/4 [")]
    assert last.endswith("step/s, 2/2 images]")


def test_previews_end_with_the_image(what):
    """Where the last step ends in no noise, its predicted x0 is what is decoded."""
    options = dataclasses.replace(what.options, preview=2, spacing="trailing")
    (made,) = generate.made(dataclasses.replace(what, options=options))
    assert made.previews.shape == (2, 2, 16, 16, 3)
    np.testing.assert_allclose(made.previews[:, 1], made.image, atol=1e-5)
    assert np.abs(made.previews[:, 0] - made.image).max() > 1e-3


@pytest.mark.parametrize(
    ("start", "count", "number", "expected"),
    [
        (0, 50, 5, [9, 19, 29, 39, 49]),
        (0, 3, 3, [0, 1, 2]),
        (2, 5, 2, [2, 4]),
        (4, 5, 3, [3, 3, 4]),
    ],
)
def test_previews_are_of_levels_that_ran(start, count, number, expected):
    assert program.preview_levels(start, count, number).tolist() == expected


def test_an_image_of_a_photo_is_drawn_again(run, photo, tmp_path, capsys):
    flags = ["--model", run, "--out", tmp_path / "out", "--images", photo]
    assert sample("img2img", *flags, "--labels", 1, 3, "--num-images", 3, "--batch-size", 4) == 0
    one = tmp_path / "out" / "00004_photo_class3_seed0.png"
    moved = run.rename(run.parent / "moved")
    try:
        assert again(one, "--model", moved, "--out", tmp_path / "again") == 0
    finally:
        moved.rename(run)
    assert capsys.readouterr().err.endswith(f"equal to {one}, pixel for pixel\n")
    np.testing.assert_array_equal(pixels(tmp_path / "again" / one.name), pixels(one))

    before = photo.read_bytes()
    photo.write_bytes(before + b" ")
    assert again(one, "--model", run, "--out", tmp_path / "other") == 1
    photo.write_bytes(before)
    assert capsys.readouterr().err.endswith(f"was made from {photo}, which has changed since\n")
    assert again(tmp_path / "out" / "grid.png") == 1
    assert "grid.png: is a grid; give one of its 6 images" in capsys.readouterr().err
    assert again(photo) == 1
    assert "carries no ldm_jax settings" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_an_image_in_another_format_is_drawn_again(run, tmp_path, capsys, kind):
    flags = ["--model", run, "--out", tmp_path / "out", "--labels", 1, 3, "--num-images", 1]
    flags += ["--image-format", kind, "--image-quality", 80]
    assert sample("class2img", *flags) == 0
    ending = images.ENDINGS[kind]
    assert {path.suffix for path in (tmp_path / "out").glob("0*")} == {ending}
    one = tmp_path / "out" / f"00001_class3_seed0{ending}"
    assert again(one, "--out", tmp_path / "again") == 0
    assert capsys.readouterr().err.endswith(f"equal to {one}, pixel for pixel\n")
    assert (tmp_path / "again" / one.name).read_bytes() == one.read_bytes()
    before = (tmp_path / "out" / "grid.png").read_bytes()
    one.unlink()
    assert sample("class2img", *flags, "--resume") == 0
    assert (tmp_path / "out" / "grid.png").read_bytes() == before
    capsys.readouterr()
    flags[-3] = "png"
    assert sample("class2img", *flags, "--resume") == 1
    assert f'image_format "{kind}", and here it is "png"' in capsys.readouterr().err


def test_a_list_goes_on_that_began_before_an_option_was_there(run, tmp_path):
    flags = ["--model", run, "--out", tmp_path, "--labels", 1, "--num-images", 2]
    assert sample("class2img", *flags, "--batch-size", 4) == 0
    one = tmp_path / "00000_class1_seed0.png"
    kept = images.read_settings(one)
    del kept["image_format"], kept["emphasis"]
    images.save_png(one, images.read_png(one), kept)
    assert sample("class2img", *flags, "--batch-size", 4, "--resume") == 0


def test_a_program_from_a_file_draws_the_same(run, tmp_path, capsys):
    flags = ["--model", run, "--labels", 2, "--num-images", 3, "--batch-size", 4]
    file = tmp_path / "sampler.bin"
    out = ["--out", tmp_path / "unused", "--export", file, "--export-platforms", "cpu", "tpu"]
    assert sample("class2img", *flags, *out) == 0
    assert not (tmp_path / "unused").exists()
    meta = export.read(file)[1]
    assert (meta["platforms"], meta["rows"], meta["program"]["steps"]) == (["cpu", "tpu"], 4, 2)
    assert file.stat().st_size < 2**20  # no weights
    given = ["--from-export", file, "--seed", 5, "--guidance-scale", 3]
    assert sample("class2img", *flags, *given, "--out", tmp_path / "a") == 0
    assert sample("class2img", *flags, *given[2:], "--out", tmp_path / "b") == 0
    for i in range(3):
        a, b = (pixels(tmp_path / name / f"{i:05d}_class2_seed5.png") for name in "ab")
        assert np.abs(a - b).max() <= 1  # one device and four
    capsys.readouterr()
    for more, message in (
        (("--steps", 4), "was exported with steps 2, and here it is 4"),
        (("--guidance-scale", 1), "was exported with guided True, and here it is False"),
        (("--height", 32), "was exported with latent [8, 8, 4], and here it is [16, 8, 4]"),
    ):
        assert sample("class2img", *flags, *given, "--out", tmp_path / "c", *more) == 1
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--preview", 3), "--preview 3 is not in 0..2, the --steps"),
        (("--first-index", -1), "--first-index -1: image numbers -1 to -1 are not"),
        (("--guidance-rescale", 2), "guidance_rescale=2.0 is not in 0..1"),
        (("--guidance-interval", 5, 2), "guidance_interval=(5.0, 2.0): none of the 2 timesteps"),
        (("--dynamic-threshold", 0), "dynamic_threshold=0.0 is not in"),
        (("--quantize-x0",), "quantize_x0"),
        (("--image-format", "jpeg", "--npz"), "--npz holds exact images: leave out"),
        (("--image-format", "jpeg", "--image-quality", 0), "--image-quality 0 is not in 1..100"),
        (("--subseed", 1), "--subseed is of the noise of other programs: give --noise-source cpu"),
        (("--seed-resize-from", 8, 8), "--seed-resize-from is of the noise of other programs"),
        (("--from-export", "gone.bin"), "gone.bin: does not exist; give a file that was exported"),
        (("--export", "x.bin", "--export-platforms", "abacus"), "platform 'abacus' is not one of"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line(run, tmp_path, capsys, flags, message):
    assert_one_line("class2img", capsys, message, "--model", run, "--out", tmp_path / "out", *flags)


def test_a_bar_of_steps_is_for_a_cpu_with_a_terminal(monkeypatch):
    options = Options(model="", out="")
    assert progress.resolved(options) == "none"
    monkeypatch.setattr(progress.progress, "is_watched", lambda: True)
    assert progress.resolved(options) == "steps"
    assert progress.resolved(dataclasses.replace(options, from_export="a.bin")) == "images"
    assert progress.resolved(dataclasses.replace(options, progress="none")) == "none"
    monkeypatch.setattr(progress.jax, "default_backend", lambda: "tpu")
    assert progress.resolved(options) == "images"


def test_a_guided_request_is_guided(what):
    """By the scale of the call; 1 gives the latents of a request without guidance."""

    def latents(request, scale):
        options = dataclasses.replace(request.options, guidance_scale=scale)
        (made,) = generate.made(dataclasses.replace(request, options=options))
        return made.latent

    three, one = (latents(dataclasses.replace(what, guided=True), scale) for scale in (3.0, 1.0))
    plain = latents(dataclasses.replace(what, guided=False), 1.0)
    assert np.abs(three - one).max() > 1e-3
    np.testing.assert_allclose(one, plain, atol=1e-4)


@pytest.mark.parametrize(("scales", "count"), [((0.0, 7.5), 1), ((0.0, 0.0), 2), ((1.0, 7.5), 0)])
def test_a_guidance_scale_of_0_is_warned_of(scales, count, caplog):
    """It drops what is asked for; turbo models' cards mean 1 by it."""
    asked = types.SimpleNamespace(guided=True, scales=np.array(scales), count=2)
    draw.say_what_is_left_out(asked)
    left_out = f"leaves out what is asked for, in {count} of 2 images: 1 samples with it"
    assert [left_out in line for line in caplog.messages] == [True] * (count > 0)
    caplog.clear()
    draw.say_what_is_left_out(types.SimpleNamespace(guided=False))
    assert not caplog.messages


def test_noise_of_steps_begins_where_the_steps_do(what):
    """Half of four levels run; the second call is the first noise of a step."""
    options = dataclasses.replace(what.options, eta=1.0, noise_source="nv", seed=3)
    what = dataclasses.replace(what, options=options)
    table = generate.step_noise_of(what, np.array([1, 1, 0]))
    assert table.shape == (3, generate.NOISES, 8, 8, 4)
    expected = noise.cuda(4, (4, 8, 8), call=1).transpose(1, 2, 0)
    np.testing.assert_array_equal(table[0, 2], expected)
    np.testing.assert_array_equal(table[0], table[1])
    assert not table[:, :2].any()
    assert not table[:, 4:].any()
    (one,) = generate.made(what)
    varied = dataclasses.replace(options, eta_noise_seed_delta=1)
    (other,) = generate.made(dataclasses.replace(what, options=varied))
    assert np.abs(one.latent - other.latent).max() > 1e-3
    deterministic = dataclasses.replace(what, options=dataclasses.replace(options, eta=0.0))
    assert generate.step_noise_of(deterministic, np.array([0])) is None
