"""Pixels: rounding, grids, and settings that travel inside a PNG."""

import numpy as np
import pytest
from PIL import Image

from ldm_jax.runtime import images


def test_to_uint8_clips_and_rounds():
    values = np.array([-7.0, -1.0, -1 + 1.4 / 127.5, 0.0, 1 - 0.6 / 127.5, 1.0, 1e9])
    assert images.to_uint8(values).tolist() == [0, 0, 1, 128, 254, 255, 255]
    every = np.arange(256)
    assert (images.to_uint8(every / 127.5 - 1) == every).all()


def test_grid_lays_images_row_by_row():
    pictures = np.stack([np.full((2, 3, 1), 10 * i, np.uint8) for i in range(5)])
    sheet = images.grid(pictures, 3, scale=2, pad=1)
    assert sheet.shape == (1 + 2 * (4 + 1), 1 + 3 * (6 + 1), 3)
    for i in range(5):
        y, x = 1 + i // 3 * 5, 1 + i % 3 * 7
        assert (sheet[y : y + 4, x : x + 6] == 10 * i).all()
        sheet[y : y + 4, x : x + 6] = 255
    assert (sheet == 255).all()


def test_grid_writes_names_beside_the_rows():
    pictures = np.full((4, 16, 16, 3), 200, np.uint8)
    plain = images.grid(pictures, 2, pad=2)
    named = images.grid(pictures, 2, pad=2, names=("a", "ten"))
    extra = named.shape[1] - plain.shape[1]
    assert (named[:, extra:] == plain).all()
    left = named[:, :extra]
    assert (left[:18] < 128).any()
    assert (left[18:] < 128).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_pixels_and_settings(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (4, 5, channels), dtype=np.uint8)
    path = tmp_path / "new" / "a.png"
    images.save_png(path, image, {"seed": 3, "task": "class2img"})
    assert images.read_settings(path) == {"seed": 3, "task": "class2img"}
    with Image.open(path) as found:
        assert found.mode == ("L" if channels == 1 else "RGB")
        assert (np.asarray(found).reshape(image.shape) == image).all()


def test_png_without_settings_is_refused_by_name(tmp_path):
    images.save_png(tmp_path / "a.png", np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(ValueError, match=r"a\.png: carries no ldm_jax settings"):
        images.read_settings(tmp_path / "a.png")
