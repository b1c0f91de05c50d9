"""Files of the user as arrays: images, and noise to start from."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from ldm_jax import finite
from ldm_jax.data import transforms
from ldm_jax.runtime import reading
from ldm_jax.sample.options import Options


def read_images(
    paths: Sequence[str],
    side: tuple[int | None, int | None] = (None, None),
    *,
    channels: int = 3,
    flag: str = "--images",
    mode: str = "crop",
) -> np.ndarray:
    """Image files as float32 [N, H, W, channels] in [-1, 1], all of one size.

    side: (height, width) in pixels, of which one may be None: each image is scaled to cover it and
    cut at the centre. With neither the images stay as they are, and must agree.
    mode: what becomes of another shape, see `resized`.
    ValueError names the file that is missing, is no image, or has another size than the first.
    """
    if not paths:
        raise ValueError(f"give {flag} FILE [FILE ...]")
    read = [resized(open_image(path, channels), side, mode=mode) for path in paths]
    for path, image in zip(paths, read, strict=True):
        if image.size != read[0].size:
            raise ValueError(
                f"{path}: is {size_of(image)} (height x width), but {paths[0]} is"
                f" {size_of(read[0])}: give images of one size, or --height and --width"
            )
    stacked = np.stack([np.asarray(image, np.float32) for image in read])
    return stacked.reshape(*stacked.shape[:3], channels) / 127.5 - 1


def open_image(path: str, channels: int) -> Image.Image:
    """An image file, grey or RGB by its channels. ValueError as in `read_images`."""
    return _decoded(path, lambda data: transforms.decode_image(data, channels))


def open_mask(path: str) -> Image.Image:
    """A mask file in mode L, 255 = masked; see `transforms.decode_mask`. ValueError names it."""
    return _decoded(path, transforms.decode_mask)


def _decoded(path: str, decode: Callable[[bytes], Image.Image]) -> Image.Image:
    if epath.Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; give image files")
    try:
        return decode(reading.read_bytes(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: does not exist; give an image file") from error
    except transforms.UndecodableError as error:
        raise ValueError(f"{path}: is not an image, or a broken one ({error})") from error
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(path) else f"{path}: {text}") from error


def resized(
    image: Image.Image,
    side: tuple[int | None, int | None],
    how: Any = Image.Resampling.BICUBIC,
    mode: str = "crop",
) -> Image.Image:
    """`image` at the height and width that `side` asks for.

    mode: "crop" scales it to cover them and cuts at the centre, "just" changes its shape, "fill"
    scales it to lie inside, and its edges go on to the borders.
    """
    if side == (None, None):
        return image
    for flag, pixels in zip(("--height", "--width"), side, strict=True):
        if pixels is not None and pixels < 1:
            raise ValueError(f"{flag} {pixels}: give at least 1 pixel")
    ratio = image.height / image.width
    height = side[0] or max(1, round(side[1] * ratio))
    width = side[1] or max(1, round(height / ratio))
    if mode == "crop":
        return ImageOps.fit(image, (width, height), how)
    if mode == "just":
        return image.resize((width, height), how)
    factor = min(width / image.width, height / image.height)
    inner = [max(1, round(factor * pixels)) for pixels in image.size]
    around = [((n - m) // 2, n - m - (n - m) // 2) for n, m in zip((width, height), inner)]
    array = np.asarray(image.resize(inner, how))
    around = [*around[::-1], (0, 0)][: array.ndim]
    return Image.fromarray(np.pad(array, around, mode="edge"))


def size_of(image: Image.Image) -> str:
    """`HEIGHTxWIDTH`."""
    return f"{image.height}x{image.width}"


def start_latents(options: Options, count: int, shape: tuple[int, int, int]) -> np.ndarray | None:
    """--init-latents as float32 [count, h, w, c]; ValueError if the file holds no such latents."""
    if options.init_latents is None:
        return None
    x_T = reading.read_npy(options.init_latents)
    first = options.first_index
    if x_T.dtype.kind not in "fiu" or not np.isfinite(x_T).all():
        raise ValueError(
            f"--init-latents {options.init_latents}: holds {x_T.dtype}, not finite numbers alone"
        )
    if x_T.shape[1:] != shape or len(x_T) < first + count:
        raise ValueError(
            f"--init-latents {options.init_latents} holds {x_T.shape}, needed is"
            f" {(first + count, *shape)}"
        )
    with np.errstate(over="ignore"):
        x_T = x_T[first : first + count].astype(np.float32)
    finite.check_array(x_T, "x_T", f"--init-latents {options.init_latents}")
    return x_T
