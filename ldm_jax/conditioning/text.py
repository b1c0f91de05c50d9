"""Captions as context tokens of a text encoder."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ldm_jax import schema
from ldm_jax.conditioning import composed
from ldm_jax.conditioning.kind import Batch, Cond, Dropped, Encode, Example, Kind, Sizes
from ldm_jax.models import bert, clip

Config = schema.TextCondConfig | schema.LayoutCondConfig


def _build(config: Config, dtype: DTypeLike, remat: bool) -> nn.Module | None:
    if isinstance(config.encoder, schema.CLIPTextConfig):
        return clip.text_from_config(config.encoder, dtype=dtype)
    return bert.from_config(config.encoder, dtype=dtype, remat=remat)


def _example(config: Config, sizes: Sizes) -> dict[str, Example]:
    ids = Example((config.encoder.max_length,), jnp.int32)
    return {"tokens": ids, "null_tokens": ids}


def _from_batch(
    config: Config, module: Any, params: dict, batch: Batch, encode: Encode | None, dropped: Dropped
) -> Cond:
    read = functools.partial(module.apply, {"params": params})
    prefix = "null_" if dropped is True else ""
    if batch[prefix + "tokens"].ndim == 2:
        return Cond(context=read(_tokens(batch, dropped)))
    texts = composed.Texts(batch[prefix + "steps"], batch[prefix + "weights"])
    return Cond(context=composed.context(read, batch, prefix), texts=texts)


def _tokens(batch: Batch, dropped: Dropped) -> jax.Array:
    """Token ids [B, L]: `null_tokens` of the batch where `dropped`, else its `tokens`."""
    if isinstance(dropped, bool):  # and the others may be absent
        return batch["null_tokens" if dropped else "tokens"]
    return jnp.where(dropped[:, None], batch["null_tokens"], batch["tokens"])


KIND = Kind(
    name=lambda config: "text",
    sampled_by=lambda config: 'text2img --prompt "..."',
    example=_example,
    from_batch=_from_batch,
    build=_build,
    module_input=lambda config: (1, config.encoder.max_length),
    context_width=lambda config: ("cond.encoder.width", config.encoder.width),
)
