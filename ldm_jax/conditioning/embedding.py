"""Given vectors as context tokens: CLIP embeddings of the text and of neighbours (RDM)."""

from typing import Any

import jax.numpy as jnp

from ldm_jax import schema
from ldm_jax.conditioning.kind import (
    Batch,
    Cond,
    Dropped,
    Encode,
    Example,
    Kind,
    Sizes,
    where_dropped,
)

Config = schema.EmbeddingCondConfig


def _example(config: Config, sizes: Sizes) -> dict[str, Example]:
    return {"embedding": Example((1, config.width), jnp.float32)}


def _from_batch(
    config: Config, module: Any, params: dict, batch: Batch, encode: Encode | None, dropped: Dropped
) -> Cond:
    given = batch["embedding"]
    null = batch.get("null_embedding", jnp.zeros_like(given))
    return Cond(context=where_dropped(dropped, null, given))


KIND = Kind(
    name=lambda config: "embeddings",
    example=_example,
    from_batch=_from_batch,
    context_width=lambda config: ("cond.width", config.width),
)
