"""Images of nothing in particular: `ldm-sample unconditional --model PATH --out DIR`."""

import dataclasses

import numpy as np

from ldm_jax import conditioning, schema
from ldm_jax.sample.draw import draw
from ldm_jax.sample.options import Load, Options, latent_shape, null_batch, open_model
from ldm_jax.sample.request import Request

NAME = "unconditional"


@dataclasses.dataclass(frozen=True)
class Options(Options):
    """Samples without a condition: of an unconditional model, or with the null condition."""

    num_images: int = 16
    """Images."""
    height: int | None = None
    """Pixels; default: the size the model was trained at."""
    width: int | None = None
    """Pixels; default: the size the model was trained at."""
    guidance_scale: float = 1.0
    """Must be 1: without a condition there is no guidance."""


def main(options: Options) -> int:
    """Writes num_images images."""
    return draw(request(options))


def request(options: Options, load: Load | None = None) -> Request:
    """The request of the options; `load` as in `open_model`.

    ValueError for guidance, or a model that needs a condition.
    """
    if options.guidance_scale != 1:
        raise ValueError(
            f"--guidance-scale {options.guidance_scale}: without a condition there is nothing to"
            " guide; leave it at 1"
        )
    model, mesh, options = open_model(options, load=load)
    if isinstance(model.config.cond, schema.HybridCondConfig):
        kind = conditioning.name_of(model.config.cond.concat)
        raise ValueError(f"{options.model}: takes an image ({kind}), which {NAME} does not give")
    null, count = null_batch(model, options.model), options.num_images
    return Request(
        NAME,
        options,
        model,
        mesh,
        shape=latent_shape(model, options.height, options.width),
        guided=False,
        batch={name: np.repeat(x, count, axis=0) for name, x in null.items()},
        names=[f"{i:05d}_seed{options.seed}" for i in range(count)],
        details=[{}] * count,
    )
