"""`ldm-sample megapixel`: windows, tiles and devices give what the public functions give."""

import dataclasses
import re

import jax
import numpy as np
import pytest
import reference
import task_models

from ldm_jax import latents, sampling, schema, sharding
from ldm_jax.conditioning import Cond
from ldm_jax.large import windows
from ldm_jax.sample import megapixel

LABEL = schema.ClassCondConfig(num_classes=3, via="label")


@pytest.fixture(scope="module")
def plain():
    return task_models.make(LABEL, num_classes=4)


@pytest.fixture(scope="module")
def run(plain, tmp_path_factory):
    return task_models.save(plain, tmp_path_factory.mktemp("plain"))


def drawn(out, model, *flags, task="megapixel"):
    """Latents of the command."""
    flags = ["--model", model, "--out", out, "--save-latents", *flags]
    assert task_models.sample(task, *flags) == 0
    return np.load(out / "latents.npy")


def sized(height, width, *flags):
    return ["--labels", 2, "--height", height, "--width", width, "--num-images", 2, *flags]


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """(Latents, first picture) of 32 x 24 pixels by class2img."""
    out = tmp_path_factory.mktemp("whole")
    z = drawn(out, run, *sized(32, 24), "--guidance-scale", 1.5, task="class2img")
    return z, task_models.pixels(out / "00000_class2_seed0.png")


def windowed(model, how, height, width):
    """The sampler of the public functions, over windows of the latent."""
    wrap = {"wrap_model": lambda net: windows.windowed(net, **how), "decode": False}
    return jax.jit(sampling.make_sampler(model, shape=(height, width, 4), steps=2, **wrap))


def test_without_flags_and_with_one_window_it_is_the_plain_sampler(run, whole, tmp_path, capsys):
    assert whole[0].shape == (2, 16, 12, 4)
    for name, flags in (("plain", []), ("window", ["--window", 32])):
        found = drawn(tmp_path / name, run, *sized(32, 24, *flags))
        np.testing.assert_array_equal(found, whole[0])
        picture = task_models.pixels(tmp_path / name / "00000_class2_seed0.png")
        np.testing.assert_array_equal(picture, whole[1])
    said = capsys.readouterr().err
    (peak, given) = re.findall(r"memory of each device: ([\d.]+) GB beside ([\d.]+) GB", said)[0]
    assert 0 <= float(peak) < 1
    assert 0 < float(given) < 1


def test_windows_are_blended_at_every_step(plain, run, whole, tmp_path):
    flags = ["--window", 16, 12, "--stride", 8, "--at-once", 2, "--window-clip", 0.1, 0.3]
    found = drawn(tmp_path, run, *sized(32, 24, *flags, "--tie-clip", 0.2, 1))
    how = {"window": (8, 6), "stride": (4, 4), "clip": (0.1, 0.3), "tie_clip": (0.2, 1)}
    cond, null = (Cond(label=np.full(1, i)) for i in (2, 3))
    draw = windowed(plain, how, 16, 12)
    expected = draw(plain.params, cond, sampling.keys_of(0, [1]), null, 1.5)
    np.testing.assert_allclose(found[1:], expected / plain.latent_scale, atol=1e-4)
    assert np.abs(found - whole[0]).max() > 0.01


@pytest.mark.parametrize("tile", [{"tile": (20,), "tile_levels": 1}, {"tile": (64,)}])
def test_tiles_are_decoded_to_the_same_image(plain, tile):
    options = megapixel.Options(model="", out="", **tile)
    _, decode = megapixel.way(plain, options, None, (16, 12, 4))
    stage, z = plain.params["first_stage"], reference.draw(1, 16, 12, 4)
    expected = jax.jit(lambda p, z: latents.decode(plain.first_stage, p, z, 1.0))(stage, z)
    np.testing.assert_allclose(jax.jit(decode)(stage, z), expected, atol=1e-4)
    _, small = megapixel.way(plain, dataclasses.replace(options, tile=(8,)), None, (16, 12, 4))
    with pytest.raises(ValueError, match="tiles reach"):
        jax.eval_shape(small, stage, z)


def test_an_image_over_four_devices_has_the_same_pixels(run, whole, tmp_path, capsys):
    found = drawn(tmp_path, run, *sized(32, 24, "--space", 4))
    np.testing.assert_allclose(found, whole[0], atol=1e-4)
    picture = task_models.pixels(tmp_path / "00000_class2_seed0.png")
    assert np.abs(picture - whole[1]).max() <= 1
    said = capsys.readouterr().err
    assert "each of 4 devices has 8 rows of an image" in said
    assert "batches of 1 " in said


def test_space_splits_every_layer(plain):
    """No array of 32 channels, as layers have, has the height of the image or its latent."""
    mesh = sharding.spatial_mesh(4)
    wrap_model, decode = megapixel.spread(plain, mesh, (32, 8, 4))
    net = wrap_model(lambda x, t, cond: jax.numpy.tanh(x) * t[:, None, None, None])

    def run(stage, z):
        return decode(stage, net(z, jax.numpy.ones(1), Cond()))

    z = jax.ShapeDtypeStruct((1, 32, 8, 4), np.float32)
    stage = plain.params["first_stage"]
    everywhere = sharding.replicated(mesh)  # as the noise and the image are
    how = {"in_shardings": (everywhere, everywhere), "out_shardings": everywhere}
    inner = jax.jit(run, **how).lower(stage, z).compile()
    heights = {int(h) for h in re.findall(r"f32\[1,(\d+),\d+,32\]", inner.as_text())}
    assert heights
    assert max(heights) < 32, heights  # 16 rows of 64, and some of the neighbours'


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """A map of 24 x 16 pixels with classes 0..2."""
    values = np.random.default_rng(0).integers(0, 3, (24, 16))
    return task_models.write_png(tmp_path_factory.mktemp("maps") / "street.png", values)


@pytest.mark.slow
def test_maps_are_cut_like_the_image(maps, tmp_path):
    cond = schema.SemanticCondConfig(num_classes=3, out_channels=None, stages=1)
    model = task_models.make(cond, in_channels=7)
    run = task_models.save(model, tmp_path)
    flags = ["--maps", maps, "--window", 16, "--stride", 8]
    found = drawn(tmp_path / "out", run, *flags)
    onehot = np.eye(3, dtype=np.float32)[task_models.pixels(maps)]
    concat = onehot.reshape(1, 12, 2, 8, 2, 3).mean((2, 4))
    how = {"window": (8, 8), "stride": (4, 4)}
    expected = windowed(model, how, 12, 8)(
        model.params, Cond(concat=concat), sampling.keys_of(0, [0]), None, 1.0
    )
    np.testing.assert_allclose(found, expected / model.latent_scale, atol=1e-4)
    assert (tmp_path / "out" / "00000_street_seed0.png").exists()


@pytest.mark.slow
def test_small_images_are_enlarged_window_by_window(tmp_path):
    model = task_models.make(schema.SuperResCondConfig(factor=2), in_channels=7)
    run = task_models.save(model, tmp_path)
    values = np.random.default_rng(0).integers(0, 256, (12, 10, 3))
    small = task_models.write_png(tmp_path / "small.png", values)
    flags = ["--images", small, "--window", 16]
    found = drawn(tmp_path / "out", run, *flags)
    assert found.shape == (1, 12, 10, 4)
    same = drawn(tmp_path / "same", run, "--images", small, "--height", 24, "--window", 16)
    np.testing.assert_array_equal(found, same)
    alone = drawn(tmp_path / "alone", run, "--images", small, task="superres")
    assert np.abs(found - alone).max() > 0.01


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--height 33", "--height 33 is not a multiple of 2"),
        ("--height 33", "take 32 or 34"),
        ("--window 15", "--window: height 15 is not a multiple of 2"),
        ("--window 16 16 16", "--window 16 16 16: give height and width"),
        ("--window 16 --stride 5", "--stride 5 is not a multiple of 2"),
        ("--window 16 --stride 18", "a stride larger than the window leaves gaps"),
        ("--window 16 --at-once 0", "at_once=0"),
        ("--window 16 --window-clip 0 1", "--window-clip 0 1: give two positive weights"),
        ("--stride 8", "--stride is an option of windows: give --window too"),
        ("--space 4 --window 16", "--space 4 with --window"),
        ("--space 4 --tile 16", "--space 4 with --tile"),
        ("--space 4 --height 20", "the height 20 cannot be split among so many: take 16 or 24"),
        ("--space 3", "space=3 does not divide the 4 devices"),
        ("--space 0", "--space 0: give a number of devices"),
        ("--maps a.png", "--maps: {run} is of another kind, which takes --prompt, "),
        ("--prompt x", "is trained with class label, not with text"),
        ("--maps a.png --height 16", "--height and --width are those of --maps"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, flags, message):
    out = ["--model", run, "--out", tmp_path / "out"]
    task_models.assert_one_line("megapixel", capsys, message.format(run=run), *out, *flags.split())
