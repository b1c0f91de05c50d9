"""Class to image: `ldm-sample class2img --model RUN --out DIR --labels 3 7`."""

import dataclasses

import numpy as np

from ldm_jax import schema
from ldm_jax.sample import common

NAME = "class2img"


@dataclasses.dataclass(frozen=True)
class Options(common.Options):
    """Samples of a class-conditional model."""

    labels: tuple[int, ...] = ()
    """Class ids; default: every class of the model (the first 10 if it has more)."""
    height: int | None = None
    """Height in pixels; default: the training size."""
    width: int | None = None
    """Width in pixels; default: the training size."""


def main(options: Options) -> int:
    """Writes num_images images of every label."""
    model, mesh, options = common.open_model(options)
    cond = model.config.cond
    if not isinstance(cond, schema.ClassCondConfig):
        kind = type(cond).__name__ if cond else "no condition"
        raise ValueError(f"{options.model}: is trained with {kind}, not with classes")
    labels = options.labels or tuple(range(min(10, cond.num_classes)))
    common.check_labels(cond, labels)
    shape = common.latent_shape(model, options.height, options.width)
    out = common.open_out(options)
    every = np.repeat(np.asarray(labels, np.int32), options.num_images)
    guided = options.guidance_scale != 1

    parts = list(common.generate(model, mesh, options, {"label": every}, len(every), guided, shape))
    names = [f"{i:05d}_class{label}_seed{options.seed}" for i, label in enumerate(every)]
    details = [{"index": i, "label": int(label)} for i, label in enumerate(every)]
    common.save(out, options, NAME, parts, names, details, rows=[str(label) for label in labels])
    return 0
