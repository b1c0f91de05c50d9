"""Pixels: rounding, grids, and settings that travel inside a PNG."""

import ast
import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from ldm_jax.runtime import images


def test_to_uint8_clips_and_rounds():
    values = np.array([-7.0, -1.0, -1 + 1.4 / 127.5, 0.0, 1 - 0.6 / 127.5, 1.0, 1e9])
    assert images.to_uint8(values).tolist() == [0, 0, 1, 128, 254, 255, 255]
    every = np.arange(256)
    assert (images.to_uint8(every / 127.5 - 1) == every).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_pixel_is_made_of_what_is_not_finite(value):
    pictures = np.zeros((4, 2, 3, 1), np.float32)
    pictures[2, 1, 1] = pictures[3, 0, 0] = value
    assert images.finite_images(pictures).tolist() == [True, True, False, False]
    with pytest.raises(FloatingPointError, match=r"2 of 4 images are not finite .* number 2"):
        images.to_uint8(pictures)
    with pytest.raises(FloatingPointError, match="1 of 1 images"):
        images.to_uint8(pictures[2])


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


# --- reading ------------------------------------------------------------------------------------


def encoded(kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("kind", images.FORMATS)
def test_formats_that_are_named_open(kind):
    with images.open_picture(encoded(kind)) as image:
        assert image.convert("RGB").size == (4, 4)


def test_a_camera_file_of_two_pictures_opens():
    out = io.BytesIO()
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    first.save(out, "MPO", save_all=True, append_images=[second])
    assert images.open_picture(out.getvalue()).convert("RGB").getpixel((0, 0))[0] > 200


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PCX", "TGA", "DDS", "JPEG2000", "PDF"])
def test_other_formats_of_pillow_are_refused(kind):
    """PostScript above all: Pillow starts Ghostscript for it, which runs what the file says."""
    with pytest.raises(ValueError, match="none of the formats that are read: PNG, JPEG, WEBP"):
        images.open_picture(encoded(kind))


def test_no_code_opens_pictures_otherwise():
    root = pathlib.Path(images.__file__).parents[2]
    modules = [
        path for top in ("ldm_jax", "train", "sample") for path in (root / top).rglob("*.py")
    ]
    assert len(modules) > 100
    calls = {
        str(path.relative_to(root))
        for path in modules
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) in ("Image.open", "PIL.Image.open", "Image.init", "Image.preinit")
    }
    assert calls == {"ldm_jax/runtime/images.py"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("[1]", "its ldm_jax settings are no object"),
        ("{", "its ldm_jax settings: is not JSON"),
        ("[" * 5000 + "]" * 5000, "its ldm_jax settings: is nested deeper than 100 levels"),
        ("1" * 5000, "its ldm_jax settings: is not JSON"),
    ],
)
def test_settings_that_are_none_are_refused(tmp_path, settings, message):
    text = images.PngImagePlugin.PngInfo()
    text.add_text("ldm_jax", settings)
    Image.new("L", (2, 2)).save(tmp_path / "a.png", pnginfo=text)
    with pytest.raises(ValueError, match=f"a.png: {message}"):
        images.read_settings(tmp_path / "a.png")


def test_only_what_is_written_carries_settings(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded("BMP"))
    with pytest.raises(ValueError, match=r"is not a PNG, JPEG or WebP, or a broken one \(none of"):
        images.read_settings(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(encoded("PNG")[:45])
    with pytest.raises(ValueError, match=r"a.png: is not a PNG, or a broken one"):
        images.read_png(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_and_webp_carry_settings_and_parameters(tmp_path, kind, channels):
    ramp = np.tile(np.arange(0, 240, 15, dtype=np.uint8)[:, None, None], (1, 16, channels))
    settings, text = {"prompt": "größer"}, "größer \U0001f40d\nSteps: 2"
    path = tmp_path / f"a{images.ENDINGS[kind]}"
    path.write_bytes(images.encoded(ramp, kind, settings, text))
    assert images.read_settings(path) == settings
    info = images.read_info(path)
    assert info["parameters"] == text
    assert "ldm_jax" in info
    assert np.abs(images.read_written(path)[..., :1].astype(int) - ramp[..., :1]).max() < 12
    worse = images.encoded(np.random.default_rng(0).integers(0, 256, ramp.shape, np.uint8), kind)
    small = images.encoded(ramp, kind, quality=5)
    assert len(small) < len(worse)
    assert "parameters" not in images.info_of(small)


def test_a_jpeg_has_room_for_little_text():
    picture = np.zeros((4, 4, 3), np.uint8)
    data = images.encoded(picture, "jpeg", {"prompt": "x" * 40_000}, "x" * 40_000)
    info = images.info_of(data)
    assert ("ldm_jax" in info, "parameters" in info) == (True, False)
    with pytest.raises(ValueError, match="are too long for a JPEG: write PNG"):
        images.encoded(picture, "jpeg", {"prompt": "x" * 70_000})
    info = images.info_of(images.encoded(picture, "webp", {"prompt": "x" * 70_000}, "a" * 40_000))
    assert ("ldm_jax" in info, "parameters" in info) == (True, True)
