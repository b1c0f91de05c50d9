"""Records, transforms and batches: data without TensorFlow."""

from ldm_jax.data.examples import Stream, stream
from ldm_jax.data.pipeline import Batches, global_batch, prefetch
from ldm_jax.data.sources import Source, arrays, open_source

__all__ = [
    "Batches",
    "Source",
    "Stream",
    "arrays",
    "global_batch",
    "open_source",
    "prefetch",
    "stream",
]
