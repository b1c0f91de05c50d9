"""`ldm-sample superres`: both kinds of model give what the public functions give."""

import dataclasses

import jax
import numpy as np
import pytest
import task_models
import text_model

from ldm_jax import bundle, conditioning, diffusion, sampling, schema
from ldm_jax.conditioning import Cond
from ldm_jax.runtime import images
from ldm_jax.sample import superres

UPSCALE = schema.HybridCondConfig(
    schema.TextCondConfig(text_model.ENCODER, trainable=False),
    schema.UpscaleCondConfig(factor=2, max_noise_level=30),
)


@pytest.fixture(scope="module")
def plain():
    return task_models.make(schema.SuperResCondConfig(factor=2), in_channels=7)


@pytest.fixture(scope="module")
def upscaler():
    return task_models.make(UPSCALE, "bytes", in_channels=7, num_classes=31, **task_models.CONTEXT)


@pytest.fixture(scope="module")
def runs(plain, upscaler, tmp_path_factory):
    models = {"plain": plain, "upscaler": upscaler}
    return {n: task_models.save(m, tmp_path_factory.mktemp(n)) for n, m in models.items()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two images of 4 x 6 pixels, as files and in [-1, 1]."""
    folder = tmp_path_factory.mktemp("small")
    values = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3))
    paths = [
        task_models.write_png(folder / f"{n}.png", x) for n, x in zip("ab", values, strict=True)
    ]
    return paths, (values / 127.5 - 1).astype(np.float32)


def test_the_small_image_stands_beside_the_latent(plain, runs, small, tmp_path):
    paths, low = small
    flags = ["--model", runs["plain"], "--out", tmp_path, "--images", *paths, "--seed", 3]
    assert task_models.sample("superres", *flags) == 0
    made = task_models.pixels(tmp_path / "00001_b_seed3.png")
    assert made.shape == (8, 12, 3)
    draw = jax.jit(sampling.make_sampler(plain, shape=(4, 6, 4), steps=2))
    image = draw(plain.params, Cond(concat=low[1:]), sampling.keys_of(3, [1]), None, 1.0)
    expected = images.to_uint8(np.asarray(image))[0].astype(int)
    assert np.abs(made - expected).max() <= 1
    kept = images.read_settings(tmp_path / "00001_b_seed3.png")
    assert (kept["task"], kept["image"], kept["guidance_scale"]) == ("superres", str(paths[1]), 1.0)


def test_the_upscaler_reads_noise_level_and_prompt(upscaler, small):
    _, low = small
    options = superres.Options(model="", out="", seed=3, prompt="a disc", negative_prompt="no")
    options = superres.with_defaults(upscaler, options)
    assert (options.guidance_scale, options.noise_level) == (9.0, 20)
    batch = superres.inputs(upscaler, dataclasses.replace(options, noise_level=9), low)
    for name, text in (("tokens", "a disc"), ("null_tokens", "no")):
        np.testing.assert_array_equal(batch[name], upscaler.tokenizer.encode([text, text]))
    cond = conditioning.from_batch(upscaler.config.cond.concat, None, {}, batch)
    np.testing.assert_array_equal(cond.label, [9, 9])

    key = jax.random.fold_in(sampling.keys_of(3, [1])[0], 3)  # of image number 1 alone
    schedule = diffusion.make_schedule("scaled_linear", beta_start=1e-4, beta_end=0.02)
    noise = diffusion.rowwise_normal(key[None], (4, 6, 3))
    concat = diffusion.q_sample(schedule, low[1:], np.array([9]), noise)
    np.testing.assert_allclose(cond.concat[1:], concat, atol=1e-6)


def test_the_upscaler_from_the_command_line(runs, small, tmp_path):
    flags = ["--model", runs["upscaler"], "--images", *small[0], "--prompt", "a disc"]
    assert task_models.sample("superres", *flags, "--out", tmp_path) == 0
    assert task_models.pixels(tmp_path / "00001_b_seed0.png").shape == (8, 12, 3)
    kept = images.read_settings(tmp_path / "00001_b_seed0.png")
    assert (kept["noise_level"], kept["guidance_scale"], kept["prompt"]) == (20, 9.0, "a disc")


def test_conditioning_takes_the_small_image_itself():
    config, low = schema.SuperResCondConfig(factor=2), np.full((1, 4, 4, 3), 1.5, np.float32)
    cond = conditioning.from_batch(config, None, {}, {"low_res": low})
    np.testing.assert_array_equal(cond.concat, low)


def test_sides_that_the_unet_cannot_halve(plain):
    net = dataclasses.replace(plain.config.unet, channel_mult=(1, 1, 1))
    model = dataclasses.replace(plain, config=dataclasses.replace(plain.config, unet=net))
    options = superres.Options(model="", out="", images=("a.png",))
    assert superres.latent_shape(model, options, (4, 8)) == (4, 8, 4)
    message = r"a\.png: is 4x7 .*multiples of 4: give --height 4 --width 8"
    with pytest.raises(ValueError, match=message):
        superres.latent_shape(model, options, (4, 7))


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("plain", [], "give --images FILE"),
        ("plain", ["--images", "{tmp}/none.png"], "none.png: does not exist"),
        ("plain", ["--images", "{tmp}/text.png"], "text.png: is not an image"),
        ("plain", ["--images", "{a}", "{tmp}/big.png"], "give images of one size"),
        ("plain", ["--images", "{a}", "--noise-level", "3"], "--noise-level 3: "),
        ("plain", ["--images", "{a}", "--prompt", "x"], "--prompt 'x': "),
        ("upscaler", ["--images", "{a}", "--noise-level", "31"], "31 is not in 0..30"),
        ("upscaler", ["--images", "{a}", "--noise-level", "-1"], "-1 is not in 0..30"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(runs, small, tmp_path, capsys, kind, flags, message):
    (tmp_path / "text.png").write_text("no image")
    task_models.write_png(tmp_path / "big.png", np.zeros((8, 8, 3)))
    flags = [flag.format(tmp=tmp_path, a=small[0][0]) for flag in flags]
    common = ["--model", runs[kind], "--out", tmp_path / "out"]
    task_models.assert_one_line("superres", capsys, message, *common, *flags)


def test_other_models_are_refused(plain):
    config = dataclasses.replace(plain.config, cond=schema.ClassCondConfig())
    model = dataclasses.replace(plain, config=config)
    assert isinstance(model, bundle.LatentDiffusion)
    with pytest.raises(ValueError, match="m: is trained with class label, not for super-res"):
        superres.with_defaults(model, superres.Options(model="m", out=""))
