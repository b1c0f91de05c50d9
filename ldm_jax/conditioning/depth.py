"""A depth map as large as the latent: one channel beside it (`v2-midas`)."""

from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax import schema
from ldm_jax.conditioning.kind import Batch, Cond, Dropped, Encode, Example, Kind, Sizes, concat

Config = schema.DepthCondConfig


def _example(config: Config, sizes: Sizes) -> dict[str, Example]:
    return {"depth": Example((*sizes.latent[:2], 1), jnp.float32)}


def _from_batch(
    config: Config, module: Any, params: dict, batch: Batch, encode: Encode | None, dropped: Dropped
) -> Cond:
    return concat(scaled_depth(batch["depth"]), dropped)


def scaled_depth(depth: jax.Array) -> jax.Array:
    """Scale depth [B, h, w, 1] to [-1, 1], per image; a constant image becomes -1."""
    low, high = (f(depth, axis=(1, 2, 3), keepdims=True) for f in (jnp.min, jnp.max))
    # the reference adds 0.001 to the range, which only matters where there is none
    return 2 * (depth - low) / jnp.maximum(high - low, 0.001) - 1


KIND = Kind(
    name=lambda config: "depth map",
    example=_example,
    from_batch=_from_batch,
    concat_channels=lambda config, latent, image: 1,
)
