"""Images of nothing in particular: `ldm-sample unconditional --model PATH --out DIR`."""

import dataclasses

import numpy as np

from ldm_jax import schema
from ldm_jax.sample import common

NAME = "unconditional"


@dataclasses.dataclass(frozen=True)
class Options(common.Options):
    """Samples without a condition: of an unconditional model, or with the null condition."""

    num_images: int = 16
    """Images."""
    height: int | None = None
    """Pixels; default: the size the model was trained at."""
    width: int | None = None
    """Pixels; default: the size the model was trained at."""
    guidance_scale: float = 1.0
    """There is nothing to guide: 1."""


def main(options: Options) -> int:
    """Writes num_images images."""
    if options.guidance_scale != 1:
        raise ValueError(
            f"--guidance-scale {options.guidance_scale}: without a condition there is nothing to"
            " guide; leave it at 1"
        )
    model, mesh, options = common.open_model(options)
    if isinstance(model.config.cond, schema.HybridCondConfig):
        kind = type(model.config.cond.concat).__name__
        raise ValueError(f"{options.model}: takes an image ({kind}), which {NAME} does not give")
    count = options.num_images
    row = common.null_batch(model, options.model)
    shape = common.latent_shape(model, options.height, options.width)
    out = common.open_out(options)
    batch = {name: np.repeat(x, count, axis=0) for name, x in row.items()}
    parts = list(common.generate(model, mesh, options, batch, count, False, shape))
    names = [f"{i:05d}_seed{options.seed}" for i in range(count)]
    details = [{"index": i} for i in range(count)]
    common.save(out, options, NAME, parts, names, details, rows=[])
    return 0
