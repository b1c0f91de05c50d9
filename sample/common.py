"""What every sampling task shares: from options to a plan, from a plan to files."""

from ldm_jax.sample.draw import draw
from ldm_jax.sample.generate import generate
from ldm_jax.sample.inputs import open_image, read_images, resized, size_of
from ldm_jax.sample.options import (
    Options,
    check_labels,
    check_tokenizer,
    latent_shape,
    null_batch,
    open_model,
)
from ldm_jax.sample.plan import Plan
from ldm_jax.sample.program import make_run
from ldm_jax.sample.write import open_out

__all__ = [
    "Options",
    "Plan",
    "check_labels",
    "check_tokenizer",
    "draw",
    "generate",
    "latent_shape",
    "make_run",
    "null_batch",
    "open_image",
    "open_model",
    "open_out",
    "read_images",
    "resized",
    "size_of",
]
