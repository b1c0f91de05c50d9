"""Hires fix: an image is drawn small, enlarged, and drawn on from there at the larger size."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal, get_args

import numpy as np
from PIL import Image
from tyro.conf import arg

from ldm_jax import bundle, finite, resizing
from ldm_jax.runtime import images
from ldm_jax.sample.options import Options as Common
from ldm_jax.sample.options import latent_shape, levels_of
from ldm_jax.sample.request import Request, Second

Upscaler = Literal[resizing.Mode, "lanczos", "nearest"]
UPSCALERS: tuple[str, ...] = (*resizing.MODES, "lanczos", "nearest")
assert set(get_args(Upscaler)) == set(UPSCALERS)


@dataclasses.dataclass(frozen=True)
class Options(Common):
    """Options of a second pass."""

    height: int | None = None
    """Pixels; default: the size the model was trained at."""
    width: int | None = None
    """Pixels; default: the size the model was trained at."""
    hires_scale: float = 1.0
    """Enlarge every image by this factor and draw on from there (hires fix); 1: no second pass."""
    hires_size: Annotated[tuple[int, int] | None, arg(metavar="HEIGHT WIDTH")] = None
    """Instead of --hires-scale: pixels of the larger image, which covers them and is cut; 0 for
    one of them keeps the shape."""
    hires_upscaler: Annotated[Upscaler, arg(metavar="NAME")] = "latent"
    """What enlarges: `latent` (bilinear), `latent-antialiased`, `latent-bicubic`,
    `latent-bicubic-antialiased`, `latent-nearest` or `latent-nearest-exact` the latent; `lanczos`
    or `nearest` the pixels."""
    hires_steps: int = 0
    """Steps that run in the second pass; 0: as many as --steps."""
    hires_strength: float = 0.7
    """Part of 0..1 of the noise levels that the second pass goes through: 0 enlarges alone, 1 keeps
    nothing."""


def asked(options: Options) -> bool:
    """True if there is a second pass. ValueError for numbers out of range."""
    finite.checked(options.hires_scale, "--hires-scale", least=1)
    if options.hires_upscaler not in UPSCALERS:
        raise ValueError(
            f"--hires-upscaler {options.hires_upscaler} is not one of {', '.join(UPSCALERS)}"
        )
    if options.hires_steps < 0:
        raise ValueError(f"--hires-steps {options.hires_steps}: give 0 or more")
    if not 0 <= options.hires_strength <= 1:
        raise ValueError(f"--hires-strength {options.hires_strength} is not in 0..1")
    if options.hires_size is None:
        return options.hires_scale > 1
    if options.hires_scale > 1:
        raise ValueError("--hires-scale and --hires-size both give the size: leave out one")
    if min(options.hires_size) < 0 or max(options.hires_size) == 0:
        raise ValueError(f"--hires-size {' '.join(map(str, options.hires_size))}: give pixels")
    return True


def with_second(first: Request, batch_of: Callable[[int, int], dict[str, np.ndarray]]) -> Request:
    """The request with a second pass as its options ask for.

    batch_of: batch_of(steps that run, steps that ran before) -> conditions of the second pass.
    ValueError for a size or a number of steps that the model cannot have.
    """
    options, model = first.options, first.model
    for flag in ("export", "from_export"):
        if getattr(options, flag) is not None:
            raise ValueError(
                f"--{flag.replace('_', '-')} is for one program, and a hires fix has two: leave out"
                " --hires-scale and --hires-size"
            )
    shape, cover = sizes(model, options, first.shape)
    down = model.config.first_stage.downsample
    number = options.hires_steps or options.steps
    # the last steps of a schedule that is so much longer, as in webui
    scheduled = int(number / options.hires_strength) if options.hires_strength else 0
    asked = dataclasses.replace(
        options,
        steps=scheduled or number,
        height=shape[0] * down,
        width=shape[1] * down,
        init_latents=None,  # those of the first pass are smaller
    )
    most = len(model.schedule.betas)
    if asked.steps > most:
        raise ValueError(
            f"--hires-strength {options.hires_strength}: {number} steps are part of {asked.steps},"
            f" and the model has {most}: give fewer --hires-steps"
        )
    levels = len(levels_of(model, asked).t)
    runs = 0 if not scheduled else levels if scheduled == number else min(number, levels)
    before = len(levels_of(model, options).t)
    second = dataclasses.replace(
        first,
        options=asked,
        shape=shape,
        batch=batch_of(max(runs, 1), before),
        start=levels - runs,
    )
    feed = _feed(options.hires_upscaler, cover, shape, down)
    return dataclasses.replace(first, second=Second(second, feed))


def sizes(
    model: bundle.LatentDiffusion, options: Options, shape: tuple[int, int, int]
) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """(shape of the larger latent, (h, w) of the one that is cut to it)."""
    step = 2 ** (len(model.config.unet.channel_mult) - 1)
    height, width, channels = shape
    if options.hires_size is None:  # a factor is rounded down to a size that the UNet can have
        ratio = options.hires_scale
        h, w = (max(side, int(side * ratio + 1e-6) // step * step) for side in (height, width))
        return (h, w, channels), (h, w)
    tall, wide = options.hires_size
    tall, wide = tall or wide * height // width, wide or tall * width // height
    h, w, _ = latent_shape(model, tall, wide, where="--hires-size: ")
    if h * width >= w * height:
        return (h, w, channels), (h, max(w, h * width // height))
    return (h, w, channels), (max(h, w * height // width), w)


def _feed(
    upscaler: str, cover: tuple[int, int], shape: tuple[int, int, int], down: int
) -> Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]:
    """`Second.feed`."""
    top, left = ((whole - part) // 2 for whole, part in zip(cover, shape, strict=False))

    def cut(x: np.ndarray, by: int = 1) -> np.ndarray:
        height, width = shape[0] * by, shape[1] * by
        return x[:, top * by : top * by + height, left * by : left * by + width]

    def latent(image: np.ndarray, z: np.ndarray) -> dict[str, np.ndarray]:
        del image
        return {"init_latent": cut(resizing.resized(np.asarray(z, np.float32), cover, upscaler))}

    def pixels(image: np.ndarray, z: np.ndarray) -> dict[str, np.ndarray]:
        del z
        how = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}[upscaler]
        size = cover[0] * down, cover[1] * down
        sound = images.finite_images(image)
        made = np.full((len(image), *size, image.shape[-1]), np.nan, np.float32)  # said when lost
        for i in np.flatnonzero(sound):
            made[i] = images.resized(image[i], size, how)
        return {"init": cut(made, down)}

    return latent if upscaler in resizing.MODES else pixels
