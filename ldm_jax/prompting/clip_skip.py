"""Clip skip: a model of text that reads an earlier layer of its text encoder."""

import dataclasses
from typing import Any

from ldm_jax import schema
from ldm_jax.bundle import LatentDiffusion
from ldm_jax.convert import text_tables


def with_clip_skip(model: LatentDiffusion, count: int) -> LatentDiffusion:
    """`model` whose text is the output of an earlier layer of CLIP, after the same final norm.

    count: 1 is the layer that the model was trained with, 2 the one before, ... For Stable
        Diffusion 1 that is the number of stable-diffusion-webui and of kohya's scripts, and one
        more than `clip_skip` of diffusers. For Stable Diffusion 2, whose own is the last but one
        layer of OpenCLIP, it is counted from that as kohya and diffusers do; webui ignores it.
    ValueError for a layer that the text encoder lacks, and for a model without one of CLIP.
    """
    text = schema.text_of(model.config.cond)
    if count == 1:
        return model
    if text is None or not isinstance(text.encoder, schema.CLIPTextConfig):
        raise ValueError(f"clip skip {count}: the model has no text encoder of CLIP; only 1 is")
    unread = {"last": 0, "penultimate": 1}[text.encoder.layer]
    layers = text.encoder.num_layers - unread
    if not 1 <= count <= layers:
        raise ValueError(f"clip skip {count} is not in 1..{layers}, the text encoder's layers")
    last = count - 1 + unread
    config, params = text_tables.without_last_layers(model.config, model.params, last)
    module: Any = model.cond_stage
    module = module.clone(num_layers=text.encoder.num_layers - last, layer="last")
    return dataclasses.replace(model, config=config, params=params, cond_stage=module)
