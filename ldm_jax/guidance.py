"""Guidance as functions from model to model; all act on the raw prediction, whatever its type."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.diffusion import append_dims


def classifier_free(
    model: Callable,
    cond: Any,
    null: Any,
    scale: jax.Array | float,
    rescale: jax.Array | float = 0.0,
    interval: tuple[jax.Array | float, jax.Array | float] | None = None,
    shared: bool = False,
    weights: jax.Array | None = None,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Make `guided(x, t_b)` of `model(x, t_b, cond)`: classifier-free guidance away from `null`.

        guided = out(null) + scale (out(cond) - out(null))

    Ho and Salimans 2022, eq. 6, where their guidance strength w is scale - 1.

    cond and null: pytrees of the same structure whose leaves are [B, ...]; one call on both, each
    example's null before its cond, so that an example stays on its device.
    scale: scalar or [B]; 1 is the plain conditional model, 0 the unconditional one.
    rescale: phi of `rescaled`, scalar or [B]; the Python number 0 leaves it out of the program.
    interval: (lowest, highest) timestep with guidance, scalars (Kynkäänniemi et al. 2024);
    outside of it the model is called once on `cond`. All timesteps of t_b must then be equal.
    shared: `model` takes x and t_b [B, ...] with cond [2 B, ...] and repeats examples itself, where
    they begin to differ (`bundle.bind`).
    weights: [B, P], with cond [B, P, ...]: P conditions at once (Liu et al. 2022, eq. 11); then

        out(cond) = out(null) + sum_p weights_p (out(cond_p) - out(null))
    """
    number = 1 if weights is None else weights.shape[1]

    def in_turn(null, cond):
        conds = cond[:, None] if weights is None else cond
        return jnp.concatenate([null[:, None], conds], axis=1).reshape(-1, *null.shape[1:])

    both = jax.tree.map(in_turn, null, cond)

    def outputs(x, t_b):
        """(out(null), out(cond))."""
        inputs = (x, t_b) if shared else (jnp.repeat(a, 1 + number, axis=0) for a in (x, t_b))
        out = model(*inputs, both).astype(x.dtype)
        out_null, *outs = jnp.moveaxis(out.reshape(len(x), 1 + number, *out.shape[1:]), 1, 0)
        if weights is None:
            return out_null, outs[0]
        pulls = (append_dims(w, x.ndim) * (o - out_null) for w, o in zip(weights.T, outs))
        return out_null, sum(pulls, start=out_null)

    def guided(x, t_b):
        out_null, out_cond = outputs(x, t_b)
        out = out_null + append_dims(scale, x.ndim) * (out_cond - out_null)
        if isinstance(rescale, int | float) and rescale == 0:
            return out
        return rescaled(out, out_cond, rescale)

    if interval is None:
        return guided

    def plain(x, t_b):
        return model(x, t_b, cond).astype(x.dtype) if weights is None else outputs(x, t_b)[1]

    def guided_within(x, t_b):
        inside = (t_b[0] >= interval[0]) & (t_b[0] <= interval[1])
        return jax.lax.cond(inside, guided, plain, x, t_b)

    return guided_within


def rescaled(guided: jax.Array, conditional: jax.Array, phi: jax.Array | float) -> jax.Array:
    """Move the standard deviation of `guided` [B, ...], by part phi, to that of `conditional`.

    Lin et al. 2023, eq. 15-16.
    """
    axes = tuple(range(1, guided.ndim))
    # an untrained network returns zeros, whose standard deviation is 0
    std = jnp.maximum(jnp.std(guided, axis=axes, keepdims=True), 1e-12)
    matched = guided * (jnp.std(conditional, axis=axes, keepdims=True) / std)
    phi = append_dims(phi, guided.ndim)
    return phi * matched + (1 - phi) * guided
