"""A segmentation map, one-hot and halved to the latent's size: channels beside it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ldm_jax import schema
from ldm_jax.conditioning.kind import Batch, Cond, Dropped, Encode, Example, Kind, Sizes, concat
from ldm_jax.models import embedders

Config = schema.SemanticCondConfig


def _build(config: Config, dtype: DTypeLike, remat: bool) -> nn.Module | None:
    return None if config.out_channels is None else _rescaler(config, dtype)


def _rescaler(config: Config, dtype: DTypeLike = jnp.float32) -> Any:
    return embedders.SpatialRescaler(
        config.num_classes, config.stages, config.out_channels, dtype=dtype
    )


def _example(config: Config, sizes: Sizes) -> dict[str, Example]:
    return {"segmentation": Example(sizes.image[:2], jnp.int32)}


def _from_batch(
    config: Config, module: Any, params: dict, batch: Batch, encode: Encode | None, dropped: Dropped
) -> Cond:
    module = module or _rescaler(config)
    return concat(module.apply({"params": params}, batch["segmentation"]), dropped)


def _check(
    config: Config, unet: schema.UNetConfig, first_stage: schema.FirstStageModelConfig, at: str
) -> None:
    down = first_stage.downsample
    if 2**config.stages != down:
        raise ValueError(
            f"{at}.stages is {config.stages} (divides by {2**config.stages}), but the first stage"
            f" downsamples by {down}"
        )


def _check_values(config: Config, batch: Batch) -> None:
    ids = batch["segmentation"]
    if isinstance(ids, jax.core.Tracer):
        return
    ids = np.asarray(ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"batch['segmentation'] is of type {ids.dtype}: give integers")
    odd = ids[(ids < 0) | (ids >= config.num_classes)]
    if odd.size:
        raise ValueError(
            f"batch['segmentation'] holds class {odd[0]}, but the model's classes are"
            f" 0..{config.num_classes - 1}"
        )


KIND = Kind(
    name=lambda config: "segmentation map",
    sampled_by=lambda config: "semantic --maps MAP",
    example=_example,
    from_batch=_from_batch,
    build=_build,
    module_input=lambda config: (1, 2**config.stages, 2**config.stages),
    concat_channels=lambda config, latent, image: config.out_channels or config.num_classes,
    check=_check,
    check_values=_check_values,
)
