"""Boxes with classes, written as tokens of a text transformer (`layout2img`)."""

import dataclasses

from ldm_jax.conditioning import text

KIND = dataclasses.replace(
    text.KIND,
    name=lambda config: "boxes with classes",
    sampled_by=lambda config: "layout2img --boxes BOXES",
)
