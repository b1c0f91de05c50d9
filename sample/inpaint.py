"""Inpainting: `ldm-sample inpaint --model PATH --out DIR --images a.png --masks mask.png`.

The model decides the way: models that see image and mask (CompVis `inpainting_big`, the 9 channels
of Stable Diffusion's) sample as they were trained; with all others the known pixels are put back at
every step. Outside of the mask every pixel of the result is the image's own, as in the reference's
`inpaint.py`.
"""

import dataclasses
from typing import Annotated, Literal

import numpy as np
import scipy.ndimage
from PIL import Image
from tyro.conf import arg

from ldm_jax import bundle, conditioning, finite, sampling, schema
from ldm_jax.runtime import flags, images
from ldm_jax.sample import adapters, editing, masking, styling
from ldm_jax.sample.draw import draw
from ldm_jax.sample.inputs import open_image, open_mask, read_images, resized, size_of
from ldm_jax.sample.options import Load, latent_shape, levels_of, open_model
from ldm_jax.sample.request import Request

NAME = "inpaint"


@dataclasses.dataclass(frozen=True)
class Options(styling.Options, editing.Options):
    """Images whose masked part is drawn by the model, or that are continued beyond their edges."""

    masks: flags.Files = ()
    """Mask files as large as the images, white where to draw, or in any colour on a transparent
    layer: one per image, or one for all."""
    pad: Annotated[tuple[int, int, int, int], arg(metavar="ABOVE BELOW LEFT RIGHT")] = (0, 0, 0, 0)
    """Pixels to draw above, below, left and right of the images (outpainting)."""
    mask_invert: bool = False
    """Draw what is black in the masks, and keep what is white."""
    resize_mode: Literal["crop", "just", "fill"] = "crop"
    """What becomes of images and masks of another shape than --height and --width: `crop` cuts
    them, `just` changes their shape, and `fill` goes on with their edges."""
    strength: float = 1.0
    """Share of the steps that run, 0..1: below 1 the drawn part begins with what is there."""
    content: Literal["fill", "original", "noise", "nothing"] = "fill"
    """What is there: `fill`, the nearest known pixels; `original`, what the mask covers; `noise` or
    `nothing`, noise or zeros in the latent."""
    only_masked: bool = False
    """Draw the part around the mask at --height and --width (default: the size of training), and
    put it back into the whole image."""
    padding: int = 32
    """Pixels around the mask that --only-masked takes in."""
    mask_blur: float = 0.0
    """Softens the edge between what is drawn and what is kept: a Gaussian of so many pixels."""


def main(options: Options) -> int:
    """Writes num_images completions of every image."""
    return draw(request(options))


def request(options: Options, load: Load | None = None) -> Request:
    """The request of the options; `load` as in `open_model`.

    ValueError for options that the model does not allow.
    """
    _check(options)
    options = adapters.with_networks(styling.styled(options))
    options, stems = editing.in_folder(options)
    model, mesh, options = open_model(options, load=load)
    beside = check_model(model, options)
    what = editing.asked(model, options)
    options = dataclasses.replace(options, guidance_scale=what.scale)
    side = (None, None) if options.only_masked else editing.side(options)
    mode, channels = options.resize_mode, editing.channels(model)
    image = read_images(options.images, side, channels=channels, mode=mode)
    image, mask = padded(image, read_masks(options, image.shape[1:3], side), options)
    made = editing.pairs(options, what, stems)
    boxes, part, hole = _parts(model, options, image, mask)

    # The first stage sees beyond a pixel: masked pixels are filled, so that none shows through.
    known = part
    if options.content != "original":
        known = np.stack([filled(a, b) for a, b in zip(part, hole, strict=True)])
    names = ("image", "mask") if beside else ("init", "init_mask")
    batch = {name: x[made.asked] for name, x in what.batch.items()}
    batch |= dict(zip(names, (known[made.image], hole[made.image]), strict=True))
    start = None
    if options.strength < 1:
        batch["init"] = known[made.image]
        start = sampling.start_of(options.strength, len(levels_of(model, options).t))
        if options.content in ("noise", "nothing"):
            share = float(options.content == "noise")
            batch["hole"] = np.full(len(made.image), share, np.float32)
    soft = masking.blurred(mask, options.mask_blur)

    def finish(places, drawn):
        which = made.image[places]
        whole = np.stack([_put_back(image[i], boxes[i], d) for i, d in zip(which, drawn)])
        share, old = soft[which], image[which]  # 0 and 1 leave either as it is, to the last bit
        return np.where(share == 1, whole, np.where(share == 0, old, old + share * (whole - old)))

    return Request(
        NAME,
        options,
        model,
        mesh,
        shape=latent_shape(model, *part.shape[1:3], where=f"{options.images[0]}: "),
        guided=what.guided,
        batch=batch,
        names=made.names,
        details=[
            {**detail, "masks": mask_of(options, which)}
            for detail, which in zip(made.details, made.image, strict=True)
        ],
        row_labels=made.row_labels,
        left=np.where(mask > 0.5, 0, image)[made.image[:: options.num_images]],
        start=start,
        finish=finish,
    )


def _check(options: Options) -> None:
    """ValueError for numbers out of range."""
    if not 0 <= options.strength <= 1:
        raise ValueError(f"--strength {options.strength} is not in 0..1")
    finite.checked(options.mask_blur, "--mask-blur", least=0)
    if options.padding < 0:
        raise ValueError(f"--padding {options.padding}: give 0 or more pixels")


def _parts(
    model: bundle.LatentDiffusion, options: Options, image: np.ndarray, mask: np.ndarray
) -> tuple[list[masking.Box], np.ndarray, np.ndarray]:
    """(box of each image, images and masks that the model sees): all of it, or around the mask."""
    if not options.only_masked:
        return [masking.Box(0, 0, *image.shape[1:3])] * len(image), image, mask
    size = options.height or model.config.size, options.width or model.config.size
    boxes = [masking.around(m, options.padding, size) for m in mask]
    part = [images.resized(box.of(i), size) for box, i in zip(boxes, image, strict=True)]
    hole = [masking.resized_mask(box.of(m), size) for box, m in zip(boxes, mask, strict=True)]
    return boxes, np.stack(part), np.stack(hole)


def _put_back(image: np.ndarray, box: masking.Box, drawn: np.ndarray) -> np.ndarray:
    """The image [H, W, c] with what was drawn in its box."""
    size = box.bottom - box.top, box.right - box.left
    whole = image.copy()
    box.of(whole)[:] = drawn if drawn.shape[:2] == size else images.resized(drawn, size)
    return whole


def mask_of(options: Options, which: int) -> list[str]:
    """The mask of image number `which`, if there are any."""
    return [options.masks[which % len(options.masks)]] if options.masks else []


def check_model(model: bundle.LatentDiffusion, options: Options) -> bool:
    """True if the model sees image and mask. ValueError if it needs another condition."""
    cond = model.config.cond
    beside = cond.concat if isinstance(cond, schema.HybridCondConfig) else cond
    if isinstance(beside, schema.InpaintCondConfig):
        return True
    if not isinstance(beside, schema.ClassCondConfig | schema.TextCondConfig | None):
        raise ValueError(
            f"{options.model}: is trained with {conditioning.name_of(beside)}; {NAME} takes models"
            " of image and mask, of text, of classes, or without condition"
        )
    return False


def read_masks(
    options: Options, size: tuple[int, int], side: tuple[int | None, int | None]
) -> np.ndarray:
    """The masks of the images, float32 [N, H, W, 1], 1 where to draw; zeros without --masks.

    size: that of the images as they were read, side: what they were scaled to.
    ValueError for a mask of another size than its image, or that is black or white all over.
    """
    images, masks = options.images, options.masks
    if not masks and not any(options.pad):
        raise ValueError("give --masks FILE [FILE ...] or --pad TOP BOTTOM LEFT RIGHT")
    if masks and len(masks) not in (1, len(images)):
        raise ValueError(f"{len(images)} --images and {len(masks)} --masks: give as many, or one")
    wanted = np.zeros((len(images), *size, 1), np.float32)
    for i, path in enumerate(images if masks else ()):
        name = masks[i % len(masks)]
        mask, image = open_mask(name), open_image(path, 1)
        if mask.size != image.size:
            raise ValueError(
                f"{name}: the mask is {size_of(mask)} (height x width), but its image {path}"
                f" is {size_of(image)}"
            )
        mask = resized(mask, side, Image.Resampling.NEAREST, options.resize_mode)
        wanted[i, ..., 0] = (np.asarray(mask) >= 128) != options.mask_invert
        if not wanted[i].any():
            where = "black" if options.mask_invert else "white"
            raise ValueError(
                f"{name}: masks nothing; {where} is where to draw, or strokes on a clear layer"
            )
        if wanted[i].all():
            keeps = "white" if options.mask_invert else "black"
            raise ValueError(f"{name}: masks the whole image; {keeps} is what to keep of {path}")
    return wanted


def padded(image: np.ndarray, mask: np.ndarray, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Add --pad pixels around image and mask, all of them masked. ValueError if negative."""
    if min(options.pad) < 0:
        raise ValueError(f"--pad {' '.join(map(str, options.pad))}: give numbers from 0 on")
    top, bottom, left, right = options.pad
    around = ((0, 0), (top, bottom), (left, right), (0, 0))
    return np.pad(image, around), np.pad(mask, around, constant_values=1)


def filled(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Replace every masked pixel of [H, W, c] by the nearest known one; mask: [H, W, 1]."""
    nearest = scipy.ndimage.distance_transform_edt(
        mask[..., 0] > 0.5, return_distances=False, return_indices=True
    )
    return image[tuple(nearest)]
