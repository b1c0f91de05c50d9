"""From a record to a training example: decode, crop, resize, flip, scale.

Pure functions on PIL images and NumPy arrays; the caller passes the random generator.
"""

from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from ldm_jax import schema
from ldm_jax.runtime import images as pictures

Images = dict[str, Image.Image]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


class TooSmallError(ValueError):
    """An image has fewer pixels than its crop needs."""


class UndecodableError(ValueError):
    """The bytes of a record are not an image. Its cause is the decoder's own error."""


def decode(record: dict[str, Any], channels: Literal[1, 3]) -> Images:
    """The images of a record: "image" (L or RGB), "segmentation" (I), "mask" (L; 255 = masked).

    UndecodableError when one cannot be decoded, ValueError when it can be read in two ways.
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
    (the reference shows whatever colour they hide). UndecodableError for bytes that are no image,
    ValueError for one of 32 bits a pixel, whose black and white are not defined.
    """
    image = _to_known_range(_open(data))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _to_known_range(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit; ValueError for whole numbers or floats of 32 bits."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = np.round(np.asarray(image) / 257).clip(0, 255)
        return Image.fromarray(grey.astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "whole numbers"
        raise ValueError(
            f"the image holds {kind} of 32 bits, whose black and white are not defined: save"
            " it with 8 or 16 bits"
        )
    return image


def decode_ids(data: bytes | np.ndarray) -> Image.Image:
    """A segmentation map in mode I: grey values or palette indices are the class ids.

    UndecodableError for bytes that are no image, ValueError for colours and for floats.
    """
    image = _open(data)
    if len(image.getbands()) != 1:
        raise ValueError(f"a segmentation map has one channel, this one is {image.mode}")
    if image.mode == "F":
        raise ValueError("a segmentation map holds whole numbers, this one floats")
    return Image.fromarray(np.asarray(image).astype(np.int32))


def decode_mask(data: bytes | np.ndarray) -> Image.Image:
    """A mask in mode L, 0 or 255 = masked, from an image or a 0/1 array.

    In an opaque image bright pixels are masked. Where pixels are transparent, as in a layer of
    brush strokes, the opaque ones are masked, in any colour. UndecodableError for bytes that are no
    image; ValueError for an image that can be read in two ways.
    """
    if isinstance(data, np.ndarray):
        return Image.fromarray((data > 0).astype(np.uint8) * 255)
    image = _to_known_range(_open(data))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"))
        bright = np.asarray(image.convert("RGB").convert("L")) >= 128
        if alpha.min() < 128:
            solid = bright[alpha == 255]
            if solid.any() and not solid.all():
                raise ValueError(
                    "the mask has transparent pixels and both bright and dark ones, so that either"
                    " could be masked: save it without transparency, white = masked"
                )
            bright = alpha >= 128
        return Image.fromarray(bright.astype(np.uint8) * 255)
    image = image.convert("L")
    if image.getextrema() == (0, 1):
        raise ValueError("the mask holds 0 and 1, which are both black: save it with white as 255")
    return image.point(lambda value: 255 * (value >= 128))


def _open(data: bytes | np.ndarray) -> Image.Image:
    if isinstance(data, np.ndarray):
        return Image.fromarray(data[..., 0] if data.shape[2:] == (1,) else data)
    try:
        image = pictures.open_picture(data)
        ImageOps.exif_transpose(image, in_place=True)  # decodes every pixel
        return image
    except MemoryError:
        raise
    # PIL's decoders raise OSError, SyntaxError, struct.error, zlib.error, IndexError, ... for
    # damaged data. The bytes are in memory, so none of these is a failure of disk or network.
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise UndecodableError(f"{kind}{error}") from error


def crop_box(
    width: int, height: int, config: schema.DataConfig, rng: np.random.Generator | None
) -> Box:
    """The square that becomes the example; random if `rng` is given (ImageNetSR of the reference).

    ValueError when a crop could have fewer pixels than `size`, or an uncropped image is not square.
    """
    short = min(width, height)
    random = config.crop == "random" and rng is not None
    check_size(width, height, config, random)
    if config.crop == "none" and width != height:
        raise ValueError(f"the image is {width}x{height}, not square: set crop to center or random")
    if not random:
        left, top = (width - short) // 2, (height - short) // 2
        return left, top, left + short, top + short
    side = max(1, int(rng.uniform(*config.crop_range) * short))
    left, top = rng.integers(0, width - side + 1), rng.integers(0, height - side + 1)
    return int(left), int(top), int(left) + side, int(top) + side


def check_size(width: int, height: int, config: schema.DataConfig, random: bool) -> None:
    """TooSmallError if a crop, drawn or not, could have fewer pixels than `size`."""
    short = min(width, height)
    smallest = int(config.crop_range[0] * short) if random else short
    if smallest < config.size and not config.allow_upscale:
        raise TooSmallError(
            f"the image is {width}x{height} and its smallest crop has {smallest} pixels a side, "
            f"less than size {config.size}: use a smaller size, remove it, or set allow_upscale"
        )


def crop_and_resize(images: Images, box: Box, config: schema.DataConfig) -> Images:
    """Every image cut to `box` and resized to `size`; maps and masks take the nearest pixel."""
    cut = {name: im if box == (0, 0, *im.size) else im.crop(box) for name, im in images.items()}
    return {
        name: (RESIZE[config.resize] if name == "image" else resize_nearest)(image, config.size)
        for name, image in cut.items()
    }


def resize_nearest(image: Image.Image, size: int) -> Image.Image:
    """Nearest pixel, which makes no new values: maps hold ids."""
    return image.resize((size, size), Image.Resampling.NEAREST)


def resize_bicubic(image: Image.Image, size: int) -> Image.Image:
    """PIL's antialiased bicubic, as the reference's LSUN."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


def resize_area(image: Image.Image, size: int) -> Image.Image:
    """The mean over each cell of a size x size grid: cv2.INTER_AREA, as the reference's ImageNet.

    PIL's BOX differs from it unless the factor is an integer: it takes a pixel on the edge of a
    cell fully or not at all, where this takes the part that lies inside.
    """
    if image.size == (size, size):
        return image
    means = _cell_means(_cell_means(np.asarray(image), size, axis=0), size, axis=1)
    return Image.fromarray(np.rint(means).astype(np.uint8))


def _cell_means(values: np.ndarray, cells: int, axis: int) -> np.ndarray:
    """Means over `cells` equal parts of an axis: differences of the integral at their edges."""
    n = values.shape[axis]
    edges = np.arange(cells + 1) * (n / cells)
    pixel = np.minimum(edges.astype(int), n - 1)  # that an edge cuts, after `part` of it
    part = np.expand_dims((edges - pixel).astype(np.float32), list(range(1, values.ndim - axis)))
    sums = np.cumsum(values, axis, dtype=np.float32)  # up to and with each pixel
    integral = sums.take(pixel, axis) - (1 - part) * values.take(pixel, axis)
    return np.diff(integral, axis=axis) * np.float32(cells / n)


RESIZE = {"area": resize_area, "bicubic": resize_bicubic}


def flip(images: Images) -> Images:
    """Every image mirrored left to right."""
    return {name: ImageOps.mirror(image) for name, image in images.items()}


def to_arrays(images: Images) -> dict[str, np.ndarray]:
    """image float32 [s, s, c] in [-1, 1], segmentation int32 [s, s], mask float32 [s, s, 1]."""
    arrays = {}
    for name, image in images.items():
        if name == "segmentation":
            arrays[name] = np.array(image, np.int32)
            continue
        pixels = np.array(image, np.float32).reshape(image.height, image.width, -1)
        pixels /= 127.5 if name == "image" else 255
        pixels -= 1 if name == "image" else 0
        arrays[name] = pixels
    return arrays


def settle(images: Images, config: schema.DataConfig, train: bool) -> Images:
    """The deterministic part, done once per record: crop and resize unless the crop is random.

    ValueError as in `crop_box`, and for a map that is not as large as its image.
    """
    width, height = images["image"].size
    for name, image in images.items():
        if image.size != (width, height):
            raise ValueError(
                f"the {name} is {image.width}x{image.height} but the image is {width}x{height}"
            )
    if train and config.crop == "random":
        check_size(width, height, config, random=True)
        return images
    return crop_and_resize(images, crop_box(width, height, config, None), config)


def to_example(
    settled: Images, config: schema.DataConfig, rng: np.random.Generator | None
) -> dict[str, np.ndarray]:
    """The random part, after `settle`: random crop and resize, flip; then scale.

    `rng` is None exactly where `settle` had train=False: nothing is random then.
    ValueError as in `crop_box`.
    """
    images = settled
    if rng is not None and config.crop == "random":
        images = crop_and_resize(images, crop_box(*images["image"].size, config, rng), config)
    if config.flip and rng is not None and rng.random() < 0.5:
        images = flip(images)
    return to_arrays(images)


def size_in_memory(images: Images) -> int:
    """Bytes of the pixels in memory: 1 each in grey images, 4 in all others, as PIL stores them."""
    return sum(im.width * im.height * (1 if im.mode == "L" else 4) for im in images.values())
