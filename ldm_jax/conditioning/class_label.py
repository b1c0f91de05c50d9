"""Class ids: one learned context token (ClassEmbedder), or added to the time embedding."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ldm_jax import schema
from ldm_jax.conditioning.kind import Batch, Cond, Dropped, Encode, Example, Kind, Sizes
from ldm_jax.models import embedders

Config = schema.ClassCondConfig


def _ids(config: Config) -> int:
    return config.num_classes + config.null_class


def _build(config: Config, dtype: DTypeLike, remat: bool) -> nn.Module | None:
    if config.via == "label":
        return None
    return embedders.ClassEmbedder(_ids(config), config.embed_dim, dtype=dtype)


def _example(config: Config, sizes: Sizes) -> dict[str, Example]:
    return {"label": Example((), jnp.int32)}


def _from_batch(
    config: Config, module: Any, params: dict, batch: Batch, encode: Encode | None, dropped: Dropped
) -> Cond:
    label = batch["label"]
    if config.null_class:
        label = jnp.where(dropped, config.num_classes, label)
    elif dropped is True:
        raise ValueError("the model has no null class: sample with guidance scale 1")
    if config.via == "label":
        return Cond(label=label)
    return Cond(context=module.apply({"params": params}, label))


def _check(
    config: Config, unet: schema.UNetConfig, first_stage: schema.FirstStageModelConfig, at: str
) -> None:
    if not config.null_class and config.dropout:
        raise ValueError(f"{at}.dropout is {config.dropout}, but {at}.null_class is False")
    if config.via == "label" and unet.num_classes != _ids(config):
        kinds = "the classes and the null class" if config.null_class else "the classes"
        raise ValueError(
            f"unet.num_classes is {unet.num_classes}: with {at}.via=label it must be"
            f" {_ids(config)}, {kinds}"
        )


def _check_values(config: Config, batch: Batch) -> None:
    label = batch["label"]
    if isinstance(label, jax.core.Tracer):
        return
    label = np.asarray(label)
    if not np.issubdtype(label.dtype, np.integer):
        raise ValueError(f"batch['label'] is of type {label.dtype}: give integers")
    odd = label[(label < 0) | (label >= _ids(config))]
    if odd.size:
        null = f", and {config.num_classes} for none of them" if config.null_class else ""
        raise ValueError(
            f"batch['label'] holds {odd.flat[0]}, but the model's classes are"
            f" 0..{config.num_classes - 1}{null}"
        )


def _check_classes(config: Config, num_classes: int) -> None:
    if num_classes > config.num_classes:
        raise ValueError(
            f"the data have {num_classes} classes, but cond.num_classes is {config.num_classes}:"
            f" set it to {num_classes}"
        )


KIND = Kind(
    name=lambda config: "class label",
    sampled_by=lambda config: "class2img",
    example=_example,
    from_batch=_from_batch,
    build=_build,
    context_width=lambda config: (
        ("cond.embed_dim", config.embed_dim) if config.via == "context" else None
    ),
    label_ids=lambda config: _ids(config) if config.via == "label" else None,
    check=_check,
    has_null=lambda config: config.null_class,
    check_values=_check_values,
    check_classes=_check_classes,
    in_turn=lambda config, count: {"label": np.arange(count, dtype=np.int32) % config.num_classes},
)
