"""`ldm-sample inpaint`: what is known stays, in all three ways; nothing compiled twice."""

import dataclasses

import jax
import numpy as np
import pytest
import task_models
from PIL import Image
from task_models import pixels

from ldm_jax import latents, loading, noise, sampling, schema
from ldm_jax.configs import tiny
from ldm_jax.runtime import images
from ldm_jax.sample import inpaint, masking
from ldm_jax.sample.program import make_run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """a, b: images of 16x16; low, right: masks of their halves, b_hole: b with noise in the low
    one; none, all, small: masks that do not work."""
    folder = tmp_path_factory.mktemp("holes")
    rng = np.random.default_rng(0)
    a, b, noise = rng.integers(0, 256, (3, 16, 16, 3), np.uint8)
    low, right = np.zeros((2, 16, 16, 1), np.uint8)
    low[8:], right[:, 8:] = 255, 255
    arrays = {"a": a, "b": b, "b_hole": np.where(low > 0, noise, b), "low": low, "right": right}
    arrays |= {"none": 0 * low, "all": 0 * low + 255, "small": low[:, :12]}
    for name, array in arrays.items():
        images.save_png(folder / f"{name}.png", array)
    return folder


def test_the_known_half_stays_and_the_hole_does_not_show_through(ldm_run, files, tmp_path):
    flags = ["--model", ldm_run, "--masks", files / "low.png", "--labels", 2]
    names = [files / f"{name}.png" for name in ("a", "b", "b_hole")]
    assert task_models.sample("inpaint", *flags, "--out", tmp_path, "--images", *names) == 0
    for i, name in enumerate(("a", "b", "b_hole")):
        found = pixels(tmp_path / f"{i:05d}_{name}_class2_seed0.png")
        np.testing.assert_array_equal(found[:8], pixels(files / f"{name}.png")[:8])
        assert np.abs(found[8:] - pixels(files / f"{name}.png")[8:]).max() > 1
    kept = images.read_settings(tmp_path / "00001_b_class2_seed0.png")
    assert (kept["task"], kept["masks"], kept["guidance_scale"]) == (
        "inpaint", [str(files / "low.png")], 1.5,
    )  # fmt: skip
    # the same number of image, and so the same noise: only what the hole held differs
    names[1], names[2] = names[2], names[1]
    again = tmp_path / "again"
    assert task_models.sample("inpaint", *flags, "--out", again, "--images", *names) == 0
    held = pixels(again / "00001_b_hole_class2_seed0.png")
    np.testing.assert_array_equal(held, pixels(tmp_path / "00001_b_class2_seed0.png"))


def test_nothing_recompiles_and_latents_outside_the_hole_are_the_images(ldm_run):
    model = loading.load(ldm_run)
    options = inpaint.Options(model="", out="", steps=4)
    run = jax.jit(make_run(model, options, guided=True, shape=(8, 8, 4)))
    image = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    hole = np.zeros((2, 16, 16, 1), np.float32)
    hole[:, 9:] = 1  # begins in the middle of a latent pixel, which is drawn whole
    batch = {"label": np.array([1, 3], np.int32), "init": image, "init_mask": hole}
    keys = sampling.keys_of(0, [0, 1])
    first = np.asarray(run(model.params, batch, keys, 2.0, 0.0)[1])
    own = latents.encode(model.first_stage, model.params["first_stage"], image, 1.0)
    np.testing.assert_allclose(first[:, :4], own[:, :4], atol=1e-4)
    assert np.abs(first[:, 4] - own[:, 4]).max() > 0.1
    compiled = run._cache_size()
    for change, seed, scale, eta in (
        ({"init_mask": hole[:, ::-1]}, 0, 2.0, 0.0),
        ({"init": -image}, 0, 2.0, 0.0),
        ({"label": np.array([2, 0], np.int32)}, 0, 2.0, 0.0),
        ({}, 1, 2.0, 0.0),
        ({}, 0, 7.5, 0.0),
        ({}, 0, 2.0, 1.0),
    ):
        keys = sampling.keys_of(seed, [0, 1])
        other = run(model.params, batch | change, keys, scale, eta)[1]
        assert np.abs(other - first).max() > 1e-4, (change, seed, scale, eta)
    assert run._cache_size() == compiled


@pytest.fixture(scope="module")
def concat_run(tmp_path_factory):
    """CompVis's way: the image with its hole, and the mask, beside the latent."""
    model = task_models.make(schema.InpaintCondConfig(), in_channels=9)
    return task_models.save(model, tmp_path_factory.mktemp("concat"))


def test_a_model_that_sees_image_and_mask(concat_run, files, tmp_path):
    flags = ["--model", concat_run, "--images", files / "a.png"]
    for mask in ("low", "right"):
        given = ["--masks", files / f"{mask}.png", "--out", tmp_path / mask, "--save-latents"]
        assert task_models.sample("inpaint", *flags, *given) == 0
    low, right = (pixels(tmp_path / name / "00000_a_seed0.png") for name in ("low", "right"))
    np.testing.assert_array_equal(low[:8], pixels(files / "a.png")[:8])
    np.testing.assert_array_equal(right[:, :8], pixels(files / "a.png")[:, :8])
    first, second = (np.load(tmp_path / name / "latents.npy") for name in ("low", "right"))
    assert np.abs(first - second).max() > 0.01  # the model saw which


@pytest.mark.slow
def test_a_model_of_text_image_and_mask_and_pixels_around(files, tmp_path):
    """Stable Diffusion's way; without --masks only what --pad adds is drawn."""
    order = schema.InpaintCondConfig("mask_image", mask_range=(0.0, 1.0), fill=0.0)
    cond = schema.HybridCondConfig(text=tiny.TEXT, concat=order)
    model = task_models.make(cond, "bytes", in_channels=9, **task_models.CONTEXT)
    flags = ["--model", task_models.save(model, tmp_path), "--images", files / "a.png"]
    flags += ["--pad", 0, 4, 2, 2, "--prompt", "a disc", "a square", "--out", tmp_path / "out"]
    assert task_models.sample("inpaint", *flags) == 0
    disc = pixels(tmp_path / "out" / "00000_a_a_disc_seed0.png")
    square = pixels(tmp_path / "out" / "00001_a_a_square_seed0.png")
    assert disc.shape == (20, 20, 3)
    for found in (disc, square):
        np.testing.assert_array_equal(found[:16, 2:18], pixels(files / "a.png"))
    assert np.abs(disc[16:] - square[16:]).max() > 1


def test_holes_are_filled_with_the_nearest_known_pixel():
    image = np.arange(5, dtype=np.float32)[:, None, None] * np.ones((1, 3, 2), np.float32)
    hole = np.zeros((5, 3, 1), np.float32)
    hole[2:] = 1
    found = inpaint.filled(image, hole)
    np.testing.assert_array_equal(found[:, 0, 0], [0, 1, 1, 1, 1])
    assert found.shape == image.shape


def test_strokes_on_a_transparent_layer_are_the_hole(files, tmp_path):
    """As drawing programs save them; in black or white."""
    with Image.open(files / "low.png") as mask:
        hole = np.asarray(mask)
    options = inpaint.Options("model", "out", images=(str(files / "a.png"),))
    for colour in (0, 255):
        layer = np.full((16, 16, 4), colour, np.uint8)
        layer[..., 3] = hole
        images.save_png(tmp_path / "layer.png", layer)
        given = dataclasses.replace(options, masks=(str(tmp_path / "layer.png"),))
        found = inpaint.read_masks(given, (16, 16), (None, None))
        np.testing.assert_array_equal(found[0, ..., 0], hole > 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give --masks FILE [FILE ...] or --pad TOP BOTTOM LEFT RIGHT"),
        ("--masks {f}/small.png", "small.png: the mask is 16x12 (height x width), but its image"),
        ("--masks {f}/small.png --height 8 --width 8", "small.png: the mask is 16x12"),
        ("--masks {f}/none.png", "none.png: masks nothing; white is where to draw"),
        ("--masks {f}/all.png", "all.png: masks the whole image; black is what to keep"),
        ("--masks {f}/all.png --mask-invert", "all.png: masks nothing; black is where to draw"),
        ("--masks {f}/low.png {f}/right.png", "1 --images and 2 --masks: give as many, or one"),
        ("--masks {f}/gone.png", "gone.png: does not exist"),
        ("--pad -1 0 0 0", "--pad -1 0 0 0: give numbers from 0 on"),
        ("--pad 1 0 0 0", "a.png: height 17 is not a multiple of 2"),
    ],
)
def test_bad_input_is_one_line(ldm_run, files, tmp_path, capsys, flags, message):
    given = ["--model", ldm_run, "--out", tmp_path / "out", "--images", files / "a.png"]
    task_models.assert_one_line("inpaint", capsys, message, *given, *flags.format(f=files).split())


def test_a_model_of_image_and_mask_takes_no_guidance(concat_run, files, tmp_path, capsys):
    flags = ["--images", files / "a.png", "--masks", files / "low.png", "--guidance-scale", 2]
    given = ["--model", concat_run, "--out", tmp_path / "out", *flags]
    task_models.assert_one_line("inpaint", capsys, "nothing to guide", *given)


def test_around_a_mask():
    mask = np.zeros((40, 60, 1))
    mask[10:14, 50:58] = 1
    assert masking.around(mask, 0, (8, 8)) == (8, 50, 16, 58)
    assert masking.around(mask, 4, (16, 16)) == (5, 46, 19, 60)  # at the edge
    assert masking.around(mask, 0, (8, 32)) == (10, 44, 14, 60)
    assert masking.around(mask, 100, (8, 8)) == (0, 0, 40, 60)
    assert masking.around(np.ones((40, 60, 1)), 0, (32, 8)) == (0, 0, 40, 60)


def test_the_part_around_the_mask_is_drawn_large_and_put_back(ldm_run, files, tmp_path):
    rng = np.random.default_rng(1)
    large = rng.integers(0, 256, (48, 40, 3), np.uint8)
    hole = np.zeros((48, 40, 1), np.uint8)
    hole[20:26, 30:36] = 255
    images.save_png(tmp_path / "large.png", large)
    images.save_png(tmp_path / "hole.png", hole)
    flags = ["--model", ldm_run, "--images", tmp_path / "large.png", "--labels", 2]
    flags += ["--masks", tmp_path / "hole.png", "--only-masked", "--padding", 4]
    for out, more in (("sharp", []), ("soft", ["--mask-blur", 2])):
        assert task_models.sample("inpaint", *flags, *more, "--out", tmp_path / out) == 0
    sharp, soft = (pixels(next((tmp_path / out).glob("0*.png"))) for out in ("sharp", "soft"))
    changed = np.any(sharp != large, axis=-1)
    assert changed[20:26, 30:36].mean() > 0.9
    changed[20:26, 30:36] = False
    assert not changed.any()
    beside = np.any(soft != large, axis=-1)
    assert beside[20:26, 25:41].sum() > beside[20:26, 30:36].sum()  # blends over the edge
    assert not beside[:14].any()


def test_a_low_strength_begins_with_what_the_mask_covers(ldm_run, files, tmp_path):
    flags = ["--model", ldm_run, "--images", files / "a.png", "--masks", files / "low.png"]
    found = {}
    for content in ("original", "fill"):
        more = ["--content", content, "--strength", 0, "--out", tmp_path / content]
        assert task_models.sample("inpaint", *flags, "--labels", 2, *more) == 0
        found[content] = pixels(next((tmp_path / content).glob("0*.png"))).astype(int)
    whole = pixels(files / "a.png")
    model = loading.load(ldm_run)
    through = model.decode(model.encode_image(whole[None].astype(np.float32) / 127.5 - 1))
    assert np.abs(found["original"] - images.to_uint8(through)[0])[8:].max() <= 1
    assert np.abs(found["fill"] - found["original"])[8:].max() > 1
    np.testing.assert_array_equal(found["fill"][:8], whole[:8])


@pytest.mark.parametrize("kind", ["plain", pytest.param("concat", marks=pytest.mark.slow)])
def test_a_low_strength_begins_with_noise_or_nothing(ldm_run, concat_run, files, tmp_path, kind):
    """In the latent, under the mask; inverted it is the other half."""
    run = {"plain": ldm_run, "concat": concat_run}[kind]
    flags = ["--model", run, "--images", files / "a.png", "--masks", files / "low.png"]
    flags += ["--strength", 0, "--noise-source", "cpu", "--seed", 3, "--save-latents"]
    found = {}
    for content in ("noise", "nothing"):
        for invert in ([], ["--mask-invert"]):
            out = tmp_path / f"{content}{len(invert)}"
            given = [*flags, "--content", content, *invert, "--out", out]
            assert task_models.sample("inpaint", *given) == 0
            found[content, bool(invert)] = np.load(out / "latents.npy")[0]
    scale = loading.load(run).latent_scale
    drawn = noise.initial("cpu", 3, found["noise", False].shape) / scale
    np.testing.assert_allclose(found["noise", False][4:], drawn[4:], atol=1e-5)
    np.testing.assert_allclose(found["noise", True][:4], drawn[:4], atol=1e-5)
    assert not found["nothing", False][4:].any()
    assert not found["nothing", True][:4].any()
    assert np.abs(found["nothing", False][:4]).min() > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--strength", "1.5"], "--strength 1.5 is not in 0..1"),
        (["--mask-blur", "nan"], "--mask-blur nan is not a finite number"),
        (["--padding", "-1"], "--padding -1: give 0 or more pixels"),
    ],
)
def test_numbers_out_of_range_are_refused(flags, message, ldm_run, files, tmp_path, capsys):
    given = ["--model", ldm_run, "--images", files / "a.png", "--masks", files / "low.png"]
    given += ["--out", tmp_path / "out", *flags]
    task_models.assert_one_line("inpaint", capsys, message, *given)
