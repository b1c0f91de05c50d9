"""The codebook of a quantized first stage in training: its moving average, codes that revive."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax import schema, sharding
from ldm_jax.models import quantize


def trains(config: schema.AutoencoderTrainConfig) -> bool:
    """True if the recipe has a codebook and trains it."""
    return isinstance(config.model, schema.AutoencoderVQConfig) and config.train_only == "all"


def start(config: schema.AutoencoderTrainConfig, params: dict) -> dict:
    """{"idle", "averages"} before the first step, each where the config asks for it."""
    if not trains(config):
        return {}
    codebook_nc = params["autoencoder"]["quantize"]["embedding"]
    codes: dict[str, Any] = {}
    if config.loss.revive_codes_after:
        codes["idle"] = jnp.zeros(len(codebook_nc), jnp.int32)
    if config.model.codebook_decay is not None:
        # copies: the step donates its state, and one buffer cannot be donated twice
        codes["averages"] = jax.tree.map(jnp.copy, quantize.start_averages(codebook_nc))
    return codes


class Updated(NamedTuple):
    """A codebook, its optimizer state and metrics after a step."""

    params: dict
    opt_state: Any
    codes: dict
    metrics: dict[str, jax.Array]
    """For the whole batch: "perplexity", "used_codes", "code_usage" (their share), "revived"."""
    replaced_n: jax.Array | None
    """Codes that are new, bool [n]; None where codes are not revived."""


def update(
    config: schema.AutoencoderTrainConfig,
    params: dict,
    opt_state: Any,
    codes: dict,
    latents: dict[str, jax.Array],
    key: jax.Array,
) -> Updated:
    """Update the codebook after the optimizer, from the latents "z" [B, h, w, c] and "indices".

    A codebook with a moving average takes its values. Codes idle for `revive_codes_after` steps
    move to latents of the batch, and their moments in the optimizer are reset.
    """
    codes, replaced_n = dict(codes), None
    codebook_nc = params["autoencoder"]["quantize"]["embedding"]
    batch = quantize.assigned(latents["z"], latents["indices"], len(codebook_nc))
    metrics = quantize.usage(batch.count_n)
    metrics["code_usage"] = metrics["used_codes"] / len(codebook_nc)
    if "averages" in codes:
        decay = config.model.codebook_decay
        averages = quantize.update_averages(codes["averages"], batch, decay)
        codebook_nc, codes["averages"] = quantize.codebook_from(averages), averages
    if "idle" in codes:
        idle_n = quantize.idle_steps(codes["idle"], batch.count_n)
        after = config.loss.revive_codes_after
        revived = quantize.revive(key, codebook_nc, idle_n, latents["z"], after)
        codebook_nc, codes["idle"], replaced_n = revived
        opt_state = _at_codebook(opt_state, lambda x: jnp.where(replaced_n[:, None], 0.0, x))
        if "averages" in codes:
            codes["averages"] = quantize.revive_averages(codes["averages"], revived)
        metrics["revived"] = jnp.sum(replaced_n)
    params = _at_codebook(params, lambda _: codebook_nc)
    return Updated(params, opt_state, codes, metrics, replaced_n)


def follow(ema_params: dict, updated: Updated) -> dict:
    """The moving average of the weights, with revived codes reset to their new values."""
    if updated.replaced_n is None:
        return ema_params
    codebook_nc = updated.params["autoencoder"]["quantize"]["embedding"]
    return _at_codebook(
        ema_params, lambda x: jnp.where(updated.replaced_n[:, None], codebook_nc, x)
    )


def _at_codebook(tree: Any, change: Callable) -> Any:
    """The tree with `change` applied to the codebook, its moments or its average."""

    def leaf(path: tuple, x: jax.Array) -> jax.Array:
        return change(x) if sharding.path_name(path).endswith("quantize/embedding") else x

    return jax.tree_util.tree_map_with_path(leaf, tree)
