"""Image to image: `ldm-sample img2img --model PATH --out DIR --images a.png --strength 0.6`."""

import dataclasses

from ldm_jax import bundle, sampling, schema
from ldm_jax.sample import common, editing

NAME = "img2img"


@dataclasses.dataclass(frozen=True)
class Options(editing.Options):
    """Images changed by a model of text, of classes, or of neither (SDEdit, Meng et al. 2021)."""

    strength: float = 0.75
    """Share of the steps that run, 0..1: 0 gives the image back, 1 keeps nothing of it."""


def main(options: Options) -> int:
    """Writes num_images variants of every image."""
    if not 0 <= options.strength <= 1:
        raise ValueError(f"--strength {options.strength} is not in 0..1")
    model, mesh, options = common.open_model(options)
    check_model(model, options)
    what = editing.asked(model, options)
    options = dataclasses.replace(options, guidance_scale=what.scale)
    image = common.read_images(
        options.images, editing.side(options), channels=editing.channels(model)
    )
    shape = common.latent_shape(model, *image.shape[1:3], where=f"{options.images[0]}: ")
    made = editing.pairs(options, what)
    out = common.open_out(options)

    batch = {name: x[made.asked] for name, x in what.rows.items()}
    batch["init"] = image[made.image]
    levels = sampling.levels_of(model, options.steps, options.spacing)
    start = sampling.start_of(options.strength, len(levels.t))
    guided, count = what.scale != 1, len(made.names)
    parts = list(common.generate(model, mesh, options, batch, count, guided, shape, start))
    left = image[made.image[:: options.num_images]]
    common.save(out, options, NAME, parts, made.names, made.details, rows=made.rows, left=left)
    return 0


def check_model(model: bundle.LatentDiffusion, options: Options) -> None:
    """ValueError if the model needs more than text or a class."""
    cond = model.config.cond
    if not isinstance(cond, schema.ClassCondConfig | schema.TextCondConfig | None):
        raise ValueError(
            f"{options.model}: is trained with {type(cond).__name__}; {NAME} takes models of text,"
            " of classes, or without condition"
        )
