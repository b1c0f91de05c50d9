"""Image to image: `ldm-sample img2img --model PATH --out DIR --images a.png --strength 0.6`."""

import dataclasses
from typing import Literal

import numpy as np

from ldm_jax import bundle, conditioning, sampling, schema
from ldm_jax.runtime import images
from ldm_jax.sample import adapters, editing, styling
from ldm_jax.sample.draw import draw
from ldm_jax.sample.inputs import read_images
from ldm_jax.sample.options import Load, latent_shape, levels_of, open_model
from ldm_jax.sample.request import Request

NAME = "img2img"


@dataclasses.dataclass(frozen=True)
class Options(styling.Options, editing.Options):
    """Images changed by a model of text, of classes, or of neither (SDEdit, Meng et al. 2021)."""

    resize_mode: Literal["crop", "just", "fill", "latent"] = "crop"
    """What becomes of images of another shape than --height and --width: `crop` cuts them, `just`
    changes their shape, `fill` goes on with their edges, and `latent` changes that of the latent
    (bilinear)."""
    strength: float = 0.75
    """Share of the steps that run, 0..1: 0 gives the image back, 1 keeps nothing of it."""


def main(options: Options) -> int:
    """Writes num_images variants of every image."""
    return draw(request(options))


def request(options: Options, load: Load | None = None) -> Request:
    """The request of the options; `load` as in `open_model`.

    ValueError for options that the model does not allow.
    """
    if not 0 <= options.strength <= 1:
        raise ValueError(f"--strength {options.strength} is not in 0..1")
    options = adapters.with_networks(styling.styled(options))
    options, stems = editing.in_folder(options)
    model, mesh, options = open_model(options, load=load)
    check_model(model, options)
    what = editing.asked(model, options)
    options = dataclasses.replace(options, guidance_scale=what.scale)
    side = editing.side(options)
    latent, channels = options.resize_mode == "latent", editing.channels(model)
    read = (None, None) if latent else side
    image = read_images(options.images, read, channels=channels, mode=options.resize_mode)
    size, where = image.shape[1:3], f"{options.images[0]}: "
    shape = latent_shape(model, *size, where)
    shown = image
    if latent and side != (None, None):
        size = tuple(new or old for new, old in zip(side, size, strict=True))
        shape = latent_shape(model, *size)
        shown = np.stack([images.resized(one, size) for one in image])
    made = editing.pairs(options, what, stems)
    batch = {name: x[made.asked] for name, x in what.batch.items()}
    levels = levels_of(model, options)
    return Request(
        NAME,
        options,
        model,
        mesh,
        shape=shape,
        guided=what.guided,
        batch={**batch, "init": image[made.image]},
        names=made.names,
        details=made.details,
        row_labels=made.row_labels,
        left=shown[made.image[:: options.num_images]],
        start=sampling.start_of(options.strength, len(levels.t)),
    )


def check_model(model: bundle.LatentDiffusion, options: Options) -> None:
    """ValueError if the model needs more than text or a class."""
    cond = model.config.cond
    if not isinstance(cond, schema.ClassCondConfig | schema.TextCondConfig | None):
        raise ValueError(
            f"{options.model}: is trained with {conditioning.name_of(cond)}; {NAME} takes models"
            " of text, of classes, or without condition"
        )
