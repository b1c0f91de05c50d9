"""Class to image: `ldm-sample class2img --model RUN --out DIR --labels 3 7`."""

import dataclasses

import numpy as np

from ldm_jax import conditioning, schema
from ldm_jax.runtime import flags
from ldm_jax.sample.draw import draw
from ldm_jax.sample.options import (
    Load,
    Options,
    label_ids,
    label_name,
    label_text,
    latent_shape,
    open_model,
)
from ldm_jax.sample.request import Request

NAME = "class2img"


@dataclasses.dataclass(frozen=True)
class Options(Options):
    """Samples of a class-conditional model."""

    labels: flags.Classes = ()
    """Classes, by id, or by name if the run keeps names; default: every class of the model (the
    first 10 if it has more)."""
    height: int | None = None
    """Height in pixels; default: the training size."""
    width: int | None = None
    """Width in pixels; default: the training size."""


def main(options: Options) -> int:
    """Writes num_images images of every label."""
    return draw(request(options))


def request(options: Options, load: Load | None = None) -> Request:
    """The request of the options; `load` as in `open_model`.

    ValueError if the model has no such classes.
    """
    model, mesh, options = open_model(options, load=load)
    cond = model.config.cond
    if not isinstance(cond, schema.ClassCondConfig):
        kind = conditioning.name_of(cond)
        raise ValueError(f"{options.model}: is trained with {kind}, not with classes")
    options = dataclasses.replace(options, labels=label_ids(model, options.labels))
    labels = options.labels or tuple(range(min(10, cond.num_classes)))
    every = np.repeat(np.asarray(labels, np.int32), options.num_images)
    return Request(
        NAME,
        options,
        model,
        mesh,
        shape=latent_shape(model, options.height, options.width),
        guided=options.guidance_scale != 1,
        batch={"label": every},
        names=[f"{i:05d}_class{label}_seed{options.seed}" for i, label in enumerate(every)],
        details=[
            {"label": label, "labels": [label]}
            | ({"class": label_name(model, label)} if model.classes else {})
            for label in every.tolist()
        ],
        row_labels=[label_text(model, label) for label in labels],
    )
