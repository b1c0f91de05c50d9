"""Pictures in requests and in answers: base64, within bounds."""

import base64
import binascii

import numpy as np
from PIL import Image

from ldm_jax.runtime import images
from ldm_jax.sample.web.limits import Limits, RefusedError


def decoded(text: str, what: str, limits: Limits) -> bytes:
    """The bytes of a picture in base64, of a format that is read and of a size within bounds.

    what: its name in messages. RefusedError for another, and for an address: none is fetched.
    """
    if text.startswith(("http://", "https://")):
        raise RefusedError(422, f"{what}: is an address, and none is fetched: send the picture")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RefusedError(422, f"{what}: is no base64 of a picture ({error})") from error
    try:
        with images.open_picture(data) as picture:
            size = picture.size
    except Exception as error:  # Pillow raises errors of many classes
        raise RefusedError(422, f"{what}: is no picture, or a broken one ({error})") from error
    limits.size(*size, what=what)
    return data


def encoded(png: bytes) -> str:
    """Base64 of a file."""
    return base64.b64encode(png).decode()


def of_array(image: np.ndarray) -> Image.Image:
    """uint8 [H, W, c] as a picture."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def opened(data: bytes) -> Image.Image:
    """The picture in some bytes, grey or RGB."""
    with images.open_picture(data) as picture:
        picture.load()
        return picture.convert("L" if picture.mode in ("1", "L") else "RGB")
