"""Records, transforms and batches: data without TensorFlow."""

from ldm_jax.data.examples import BadDataError, Stream, stream
from ldm_jax.data.facts import facts_of
from ldm_jax.data.pipeline import Batches, batch_of_nan, global_batch, prefetch, read
from ldm_jax.data.sources import Source, arrays, open_source, stamp

__all__ = [
    "BadDataError",
    "Batches",
    "Source",
    "Stream",
    "arrays",
    "batch_of_nan",
    "facts_of",
    "global_batch",
    "open_source",
    "prefetch",
    "read",
    "stamp",
    "stream",
]
