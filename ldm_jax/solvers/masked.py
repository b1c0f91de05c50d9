"""Inpainting with any solver and any model: keep the known part of a latent, draw the rest."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.diffusion import Denoised, rowwise_normal


def masked(
    denoise: Callable[[jax.Array, Any], Denoised],
    x0: jax.Array,
    mask: jax.Array,
    noise: Callable[[Any], jax.Array],
) -> Callable[[jax.Array, Any], Denoised]:
    """`denoise` that sees `x0`, noised to its level, outside the mask.

    x0: [B, h, w, c]; mask: [B, h, w, 1], 1 where x is drawn (the reference's mask is 1 - mask).
    noise: level -> unit normal [B, h, w, c], fresh at every level in the reference.
    Blends before the model is called, as the reference's DDIM and PLMS do. Its DDPM blends after
    the step, and so shows the model the known part at the noise of the level before; here all
    solvers do the same. Outside the mask their result is the model's guess: see `composite`.
    """

    def blended(x, level):
        known = level.alpha * x0 + level.sigma * noise(level)
        return denoise(composite(x, known, mask), level)

    return blended


def composite(drawn: jax.Array, known: jax.Array, mask: jax.Array) -> jax.Array:
    """`drawn` in the mask, `known` elsewhere; fractions mix."""
    return mask * drawn + (1 - mask) * known


def fresh_noise(keys: jax.Array, shape: tuple[int, ...]) -> Callable[[Any], jax.Array]:
    """noise(level) [B, *shape] for `masked`: each from its key and the level alone."""

    def noise(level):
        # a solver may call the model between the levels of its table: sigma tells them apart
        number = jax.lax.bitcast_convert_type(jnp.float32(level.sigma), jnp.uint32)
        return rowwise_normal(jax.vmap(jax.random.fold_in, (0, None))(keys, number), shape)

    return noise
