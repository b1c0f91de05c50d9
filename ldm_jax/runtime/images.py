"""Pictures: opening files, uint8 images and grids, files that carry their settings."""

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageDraw,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from ldm_jax import finite
from ldm_jax.runtime import reading, storage

# Every reader now: Pillow loads those that it lacks when it first meets their format, and a thread
# that meets one while another loads it is told that no such format exists.
READERS = {
    "PNG": PngImagePlugin,
    "JPEG": JpegImagePlugin,  # also MPO, several in one file, as cameras write it
    "WEBP": WebPImagePlugin,
    "BMP": BmpImagePlugin,
    "TIFF": TiffImagePlugin,
    "GIF": GifImagePlugin,
    "PPM": PpmImagePlugin,
}
WRITTEN = ("PNG", "JPEG", "WEBP")
FORMATS = tuple(READERS)
"""Those that are read, whatever a file is called. Pillow knows 43 formats, PostScript among
them, whose reader starts Ghostscript: a program in a file named `cat.png`."""


def open_picture(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """An encoded picture of one of `FORMATS`, not yet decoded. ValueError if it is none."""
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:
        raise ValueError(f"none of the formats that are read: {', '.join(formats)}") from error


def to_uint8(image: np.ndarray) -> np.ndarray:
    """[-1, 1] -> 0..255, clipped and rounded (the reference truncates).

    FloatingPointError for NaN and infinity, which would become black and white.
    """
    image = np.asarray(image, np.float32)
    if not finite.is_finite(image):
        sound = finite_images(image if image.ndim == 4 else image[None])
        raise FloatingPointError(
            f"{(~sound).sum()} of {len(sound)} images are not finite (NaN or infinity), the first"
            f" of them number {np.argmin(sound)}: no picture is made of them"
        )
    return np.rint((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)


def resized(
    image: np.ndarray, size: tuple[int, int], how: Image.Resampling = Image.Resampling.LANCZOS
) -> np.ndarray:
    """[H, W, c] in [-1, 1] at (height, width), through uint8."""
    pixels = to_uint8(image)
    squeezed = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    scaled = Image.fromarray(squeezed).resize(size[::-1], how)
    return np.asarray(scaled, np.float32).reshape(*size, -1) / 127.5 - 1


def finite_images(image: np.ndarray) -> np.ndarray:
    """Tell which images of an array [N, ...] hold neither NaN nor infinity, bool [N]."""
    return np.array([finite.is_finite(x) for x in image], bool)


def grid(
    images: np.ndarray,
    columns: int,
    *,
    scale: int = 1,
    pad: int = 2,
    names: Sequence[str] = (),
    titles: Sequence[str] = (),
) -> np.ndarray:
    """[N, H, W, c] uint8 -> one RGB picture, row by row.

    names: labels of the rows, at the left; titles: of the columns, on top, cut where one is full.
    """
    n, h, w, c = images.shape
    images = np.repeat(np.repeat(images, scale, axis=1), scale, axis=2)
    images = np.repeat(images, 3, axis=-1) if c == 1 else images
    h, w = h * scale, w * scale
    rows = -(-n // columns)
    left = 8 + 7 * max(map(len, names)) if names else pad
    top = 16 if any(titles) else pad
    sheet = np.full((top + rows * (h + pad), left + columns * (w + pad), 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = top + i // columns * (h + pad), left + i % columns * (w + pad)
        sheet[y : y + h, x : x + w] = image
    if not names and not any(titles):
        return sheet
    picture = Image.fromarray(sheet)
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        draw.text((4, top + row * (h + pad) + h // 2 - 6), name, fill=(0, 0, 0))
    for column, title in enumerate(titles):
        draw.text((left + column * (w + pad) + 2, 2), title[: max(1, w // 7)], fill=(0, 0, 0))
    return np.asarray(picture)


def save_png(
    path: Any, image: np.ndarray, settings: dict | None = None, parameters: str | None = None
) -> None:
    """Writes `png` to a path. Readers see the whole file, or none under this name."""
    storage.write_whole(epath.Path(path), png(image, settings, parameters))


def png(image: np.ndarray, settings: dict | None = None, parameters: str | None = None) -> bytes:
    """A PNG of uint8 [H, W, c] with `settings` as JSON in its text field "ldm_jax".

    parameters: text for other programs, in the field "parameters"; see `prompting.parameters`.
    """
    text = PngImagePlugin.PngInfo()
    if settings is not None:
        text.add_text("ldm_jax", json.dumps(settings))
    if parameters is not None:
        text.add_text("parameters", parameters)
    buffer = io.BytesIO()
    squeezed = image[..., 0] if image.shape[-1] == 1 else image
    Image.fromarray(squeezed).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


ENDINGS: dict[str, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
"""{format that is written: ending of its files}."""
USER_COMMENT = (0x8769, 0x9286)
"""EXIF directory and tag where JPEG and WebP files of other programs keep their text."""
MAKER_NOTE = 0x927C
"""EXIF tag, in the same directory, of our own settings."""
OURS = b"ldm_jax\0"
MOST_EXIF = 65_000  # bytes that a JPEG has room for


def encoded(
    image: np.ndarray,
    kind: str,
    settings: dict | None = None,
    parameters: str | None = None,
    quality: int = 95,
) -> bytes:
    """uint8 [H, W, c] as a file of a kind of `ENDINGS`, with the texts of `png` in it.

    JPEG and WebP, of a quality of 1..100, have them in their EXIF. ValueError for settings that are
    too long for a JPEG; the parameters are left out first.
    """
    if kind == "png":
        return png(image, settings, parameters)
    exif = _exif(settings, parameters)
    if kind == "jpeg" and len(exif) > MOST_EXIF:
        exif = _exif(settings, None)
        if len(exif) > MOST_EXIF:
            raise ValueError(f"settings of {len(exif)} bytes are too long for a JPEG: write PNG")
    buffer = io.BytesIO()
    squeezed = image[..., 0] if image.shape[-1] == 1 else image
    Image.fromarray(squeezed).save(buffer, kind, quality=quality, exif=exif)
    return buffer.getvalue()


def _exif(settings: dict | None, parameters: str | None) -> bytes:
    exif = Image.Exif()
    folder = exif.get_ifd(USER_COMMENT[0])
    if settings is not None:
        folder[MAKER_NOTE] = OURS + json.dumps(settings).encode()
    if parameters is not None:
        folder[USER_COMMENT[1]] = b"UNICODE\0" + parameters.encode("utf-16-be")
    return exif.tobytes()


def read_settings(path: Any) -> dict:
    """The settings that `encoded` wrote. ValueError if the file carries none, or is no picture."""
    data = reading.read_bytes(path)
    try:
        with open_picture(data, WRITTEN) as image:
            text = image.info.get("ldm_jax")
            note = image.getexif().get_ifd(USER_COMMENT[0]).get(MAKER_NOTE)
            if text is None and isinstance(note, bytes) and note.startswith(OURS):
                text = note.removeprefix(OURS).decode()
    except Exception as error:  # Pillow raises errors of many classes, see `transforms`
        raise ValueError(
            f"{path}: is not a PNG, JPEG or WebP, or a broken one ({error})"
        ) from error
    if not isinstance(text, str):
        raise ValueError(f"{path}: carries no ldm_jax settings; it was not written by ldm-sample")
    settings = reading.parse_json(text, f"{path}: its ldm_jax settings")
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: its ldm_jax settings are no object of names and values")
    return settings


def read_info(path: Any) -> dict[str, Any]:
    """Text fields of a picture; see `info_of`. ValueError, naming the file, for no picture."""
    try:
        return info_of(reading.read_bytes(path))
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from error


def info_of(data: bytes) -> dict[str, Any]:
    """Text fields of an encoded picture; the EXIF comment of a JPEG or WebP as "parameters".

    ValueError for what is no picture.
    """
    try:
        with open_picture(data) as image:
            image.load()  # PNG text may stand behind the pixels
            info = dict(image.info)
            folder = image.getexif().get_ifd(USER_COMMENT[0])
            comment, note = folder.get(USER_COMMENT[1]), folder.get(MAKER_NOTE)
    except Exception as error:
        raise ValueError(f"is no picture, or a broken one ({error})") from error
    if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
        info["parameters"] = comment[8:].decode("utf-16-be", errors="replace")
    if isinstance(note, bytes) and note.startswith(OURS):
        info["ldm_jax"] = note.removeprefix(OURS).decode(errors="replace")
    return info


def read_png(path: Any) -> np.ndarray:
    """uint8 [H, W, c] of a PNG that `save_png` wrote. ValueError names what is none."""
    return _read(path, ("PNG",))


def read_written(path: Any) -> np.ndarray:
    """uint8 [H, W, c] of a file that `encoded` made. ValueError names what is none."""
    return _read(path, WRITTEN)


def _read(path: Any, formats: tuple[str, ...]) -> np.ndarray:
    data = reading.read_bytes(path)
    try:
        with open_picture(data, formats) as image:
            pixels = np.asarray(image)
    except Exception as error:
        kinds = " or ".join(formats)
        raise ValueError(f"{path}: is not a {kinds}, or a broken one ({error})") from error
    return pixels if pixels.ndim == 3 else pixels[..., None]
