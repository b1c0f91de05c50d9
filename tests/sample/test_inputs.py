"""What the sampling tasks share: images read from files."""

import numpy as np
import pytest
from PIL import Image

from ldm_jax.runtime import images
from ldm_jax.sample.inputs import read_images, resized


@pytest.fixture
def files(tmp_path):
    """Three images: two of 6x4 pixels, grey and RGB, and one of 8x8."""
    rng = np.random.default_rng(0)
    for name, shape in (("grey", (6, 4, 1)), ("rgb", (6, 4, 3)), ("square", (8, 8, 3))):
        images.save_png(tmp_path / f"{name}.png", rng.integers(0, 256, shape, np.uint8))
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(np.ones((6, 4), np.float32)).save(tmp_path / "float.tif")
    return tmp_path


def test_images_keep_every_grey_level(files):
    paths = [str(files / "rgb.png"), str(files / "grey.png")]
    read = read_images(paths)
    assert (read.shape, read.dtype) == ((2, 6, 4, 3), np.float32)
    assert read.min() >= -1
    assert read.max() <= 1
    expected = np.asarray(Image.open(files / "rgb.png"))
    np.testing.assert_array_equal(images.to_uint8(read[0]), expected)
    assert read_images(paths, channels=1).shape == (2, 6, 4, 1)


@pytest.mark.parametrize(
    ("side", "shape"), [((4, 4), (4, 4)), ((12, None), (12, 8)), ((None, 2), (3, 2))]
)
def test_images_are_scaled_to_cover_and_cut_at_the_centre(files, side, shape):
    assert read_images([str(files / "rgb.png")], side).shape == (1, *shape, 3)
    ramp = np.tile(np.arange(0, 120, 10, dtype=np.uint8)[:, None, None], (1, 4, 1))
    images.save_png(files / "ramp.png", ramp)  # 12 high, 4 wide
    cut = read_images([str(files / "ramp.png")], (4, 4), channels=1)
    np.testing.assert_array_equal(images.to_uint8(cut)[0, :, 0, 0], [40, 50, 60, 70])


@pytest.mark.parametrize(
    ("names", "side", "message"),
    [
        ([], (None, None), "give --images FILE"),
        (["gone.png"], (None, None), "gone.png: does not exist"),
        (["text.png"], (None, None), "text.png: is not an image"),
        (["float.tif"], (None, None), "float.tif: the image holds floats of 32 bits"),
        (["."], (None, None), "is a folder; give image files"),
        (["rgb.png", "square.png"], (None, None), r"square.png: is 8x8 .*rgb.png is 6x4"),
        (["rgb.png"], (0, None), "--height 0: give at least 1 pixel"),
    ],
)
def test_bad_images_are_named(files, names, side, message):
    with pytest.raises(ValueError, match=message):
        read_images([str(files / name) for name in names], side)


def test_other_shapes_are_squeezed_or_go_on_with_their_edges(files):
    ramp = np.tile(np.arange(0, 120, 10, dtype=np.uint8)[:, None, None], (1, 4, 1))
    images.save_png(files / "ramp.png", ramp)  # 12 high, 4 wide
    with Image.open(files / "ramp.png") as ramp:
        just = np.asarray(resized(ramp, (6, 8), Image.Resampling.NEAREST, "just"))
        np.testing.assert_array_equal(just, np.repeat(np.arange(10, 120, 20), 8).reshape(6, 8))
        whole = np.asarray(resized(ramp, (12, 9), mode="fill"))
        np.testing.assert_array_equal(whole, np.repeat(np.arange(0, 120, 10), 9).reshape(12, 9))
        wide = np.asarray(resized(ramp.rotate(90, expand=True), (20, 12), mode="fill"))
    assert wide.shape == (20, 12)
    assert (wide == wide[10]).all()
    path = str(files / "rgb.png")
    assert read_images([path], (4, 9), mode="fill").shape == (1, 4, 9, 3)
    assert read_images([path], (4, None), mode="fill").shape == (1, 4, 3, 3)
