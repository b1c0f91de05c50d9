"""From a record to a training row: decode, crop, resize, flip, scale.

Pure functions on PIL images and NumPy arrays; whoever calls passes the random generator.
"""

import io
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from ldm_jax import schema

# The reference's ImageNet resizes with cv2.INTER_AREA. BOX equals it where the factor is an
# integer; elsewhere it counts a pixel on the edge of a cell fully or not at all.
FILTERS = {"area": Image.Resampling.BOX, "bicubic": Image.Resampling.BICUBIC}

# Every plugin now: `open` loads them when it first meets their format, and a thread that meets one
# while another loads it is told that no such format exists.
Image.init()

Images = dict[str, Image.Image]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


class UndecodableError(ValueError):
    """The bytes of a record are not an image. Its cause is the decoder's own error."""


def decode(record: dict[str, Any], channels: Literal[1, 3]) -> Images:
    """The images of a record: "image" (L or RGB), "segmentation" (I), "mask" (L; 255 = hole).

    UndecodableError when one cannot be decoded.
    """
    images = {"image": decode_image(record["image"], channels)}
    if "segmentation" in record:
        images["segmentation"] = decode_ids(record["segmentation"])
    if "mask" in record:
        images["mask"] = decode_mask(record["mask"])
    return images


def decode_image(data: bytes | np.ndarray, channels: Literal[1, 3]) -> Image.Image:
    """Any image as 8-bit grey or RGB, turned as its EXIF tag says.

    16-bit grey keeps its brightness (PIL would clip it) and transparent pixels are laid on white
    (the reference shows whatever colour they hide).
    """
    image = _open(data)
    if image.mode.startswith("I"):
        image = Image.fromarray(np.round(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def decode_ids(data: bytes | np.ndarray) -> Image.Image:
    """A segmentation map in mode I: grey values or palette indices are the class ids."""
    image = _open(data)
    if len(image.getbands()) != 1:
        raise ValueError(f"a segmentation map has one channel, this one is {image.mode}")
    return Image.fromarray(np.asarray(image).astype(np.int32))


def decode_mask(data: bytes | np.ndarray) -> Image.Image:
    """A mask in mode L, 0 or 255 = hole, from an image (bright = hole) or a 0/1 array."""
    if isinstance(data, np.ndarray):
        return Image.fromarray((data > 0).astype(np.uint8) * 255)
    return decode_image(data, 1).point(lambda value: 255 * (value >= 128))


def _open(data: bytes | np.ndarray) -> Image.Image:
    if isinstance(data, np.ndarray):
        return Image.fromarray(data[..., 0] if data.shape[2:] == (1,) else data)
    try:
        return ImageOps.exif_transpose(Image.open(io.BytesIO(data)))  # loads every pixel
    except MemoryError:
        raise
    # PIL's decoders raise whatever they stumble on: OSError, SyntaxError, struct.error, zlib.error,
    # IndexError, ... The bytes are in memory, so none of it is a failure of disk or network.
    except Exception as error:
        raise UndecodableError(f"{type(error).__name__}: {error}") from error


def crop_box(
    width: int, height: int, config: schema.DataConfig, rng: np.random.Generator | None
) -> Box:
    """The square that becomes the row; random if `rng` is given (ImageNetSR of the reference).

    ValueError when a crop could have fewer pixels than `size`, or an uncropped image is not square.
    """
    short = min(width, height)
    random = config.crop == "random" and rng is not None
    smallest = int(config.crop_range[0] * short) if config.crop == "random" else short
    if smallest < config.size and not config.allow_upscale:
        raise ValueError(
            f"the image is {width}x{height} and its smallest crop has {smallest} pixels a side, "
            f"less than size {config.size}: use a smaller size, remove it, or set allow_upscale"
        )
    if config.crop == "none" and width != height:
        raise ValueError(f"the image is {width}x{height}, not square: set crop to center or random")
    if not random:
        left, top = (width - short) // 2, (height - short) // 2
        return left, top, left + short, top + short
    side = max(1, int(rng.uniform(*config.crop_range) * short))
    left, top = rng.integers(0, width - side + 1), rng.integers(0, height - side + 1)
    return int(left), int(top), int(left) + side, int(top) + side


def crop_and_resize(images: Images, box: Box, config: schema.DataConfig) -> Images:
    """Every image cut to `box` and resized to `size`; maps and masks take the nearest pixel."""
    square = (config.size, config.size)

    def resize(name: str, image: Image.Image) -> Image.Image:
        image = image if box == (0, 0, *image.size) else image.crop(box)
        nearest = Image.Resampling.NEAREST
        return image.resize(square, FILTERS[config.resize] if name == "image" else nearest)

    return {name: resize(name, image) for name, image in images.items()}


def flip(images: Images) -> Images:
    """Every image mirrored left to right."""
    return {name: ImageOps.mirror(image) for name, image in images.items()}


def to_arrays(images: Images) -> dict[str, np.ndarray]:
    """image float32 [s, s, c] in [-1, 1], segmentation int32 [s, s], mask float32 [s, s, 1]."""
    arrays = {}
    for name, image in images.items():
        pixels = np.asarray(image)
        if name == "segmentation":
            arrays[name] = pixels.astype(np.int32)
            continue
        pixels = pixels.reshape(*pixels.shape[:2], -1).astype(np.float32)
        arrays[name] = pixels / 127.5 - 1 if name == "image" else pixels / 255
    return arrays


def to_row(
    images: Images, config: schema.DataConfig, rng: np.random.Generator | None
) -> dict[str, np.ndarray]:
    """Crop, resize, flip and scale; without `rng` the centre crop, unmirrored.

    ValueError as in `crop_box`, and for a map that is not as large as its image.
    """
    width, height = images["image"].size
    for name, image in images.items():
        if image.size != (width, height):
            raise ValueError(
                f"the {name} is {image.width}x{image.height} but the image is {width}x{height}"
            )
    images = crop_and_resize(images, crop_box(width, height, config, rng), config)
    if config.flip and rng is not None and rng.random() < 0.5:
        images = flip(images)
    return to_arrays(images)
