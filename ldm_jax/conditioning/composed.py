"""Texts in parts, in chunks, with weights, that change from step to step: `prompting.composed`.

Axes of the arrays: b batch, p prompts that AND joins, v texts that a prompt is in turn, n chunks of
a text, l tokens of a chunk, s steps. All are encoded before the loop over steps, which looks them
up, so that other words, weights and changes are other arrays of the same program.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp


class Texts(NamedTuple):
    """How the parts of a `Cond.context` [B, P, V, n l, C] make up the condition of a step."""

    steps: jax.Array
    """Int [B, P, S]: which of the V texts is read at each step."""
    weights: jax.Array
    """[B, P]: weight of each prompt that AND joins."""


def context(encode: Callable, batch: Mapping[str, Any], prefix: str = "") -> jax.Array:
    """Context [B, P, V, n l, C] of the texts of a batch; encode: ids [N, l] -> [N, l, C].

    Of the batch, each name with `prefix` before it:
    tokens: int [B, P, V, n, l].
    token_weights: [B, P, V, n, l]; what the encoder makes of a token is multiplied by it.
    text_counts: [B, P, V], how often a text is in its prompt's schedule; 0 for those that fill up.
    chunk_counts: int [B, P, V], chunks of each text; from the last on, its last vector is repeated.
    keep_mean: [B], 1 where weights leave the mean of a chunk, over all texts of a prompt, as it was
        ("Original" of stable-diffusion-webui), else 0 ("No norm").
    """
    tokens, weights, counts, chunks, keep_mean = (
        batch[prefix + name]
        for name in ("tokens", "token_weights", "text_counts", "chunk_counts", "keep_mean")
    )
    b, p, v, n, length = tokens.shape
    plain = encode(tokens.reshape(-1, length))
    plain = plain.reshape(b, p, v, n, length, -1)
    weighted = plain * weights[..., None]
    share = (counts / jnp.sum(counts, axis=2, keepdims=True))[..., None]  # [b, p, v, n]

    def mean(z: jax.Array) -> jax.Array:
        """Mean of each chunk over the texts of a prompt: [b, p, 1, n, 1, 1]."""
        of_text = jnp.mean(z, axis=(-2, -1))
        return jnp.sum(of_text * share, axis=2, keepdims=True)[..., None, None]

    before, after = mean(plain), mean(weighted)
    ratio = jnp.where(after == 0, 1.0, before / jnp.where(after == 0, 1.0, after))
    kept = keep_mean.reshape(-1, 1, 1, 1, 1, 1)
    z = weighted * jnp.where(kept > 0, ratio, 1.0)
    z = einops.rearrange(z, "b p v n l c -> b p v (n l) c")
    at = jnp.minimum(jnp.arange(n * length)[None, None, None], chunks[..., None] * length - 1)
    return jnp.take_along_axis(z, at[..., None], axis=3)
