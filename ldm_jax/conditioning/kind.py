"""A kind of conditioning: the functions that each file of this folder gives for its config."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ldm_jax import schema
from ldm_jax.conditioning.composed import Texts

Encode = Callable[[jax.Array], jax.Array]  # image_bhwc -> scaled latent, the posterior's mode
Batch = Mapping[str, Any]  # name -> [B, ...] array
# [B] bool or one bool: True where the null condition replaces the given one
Dropped = jax.Array | bool


class Cond(NamedTuple):
    """Conditioning of a batch; a kind that a model does not use is None."""

    context: jax.Array | None = None
    """[B, l, c] tokens for cross-attention."""
    concat: jax.Array | None = None
    """[B, h, w, c] channels concatenated to the noised latent."""
    label: jax.Array | None = None
    """[B] class ids or [B, v] vectors added to the time embedding."""
    kv_cache: Mapping[str, Any] | None = None
    """Keys and values that a UNet's layers make of `context`, [B, ...]: `bundle.with_kv_cache`."""
    texts: Texts | None = None
    """Given: `context` is [B, P, V, l, c], of which a step reads a part, see `composed`."""


def at_step(cond: Cond, step: Any) -> Cond:
    """The conditions [B, P, ...] of the P prompts that AND joins, at one step; of one with `texts`.

    step: int, also traced; later ones than `texts` knows read as its last.
    """
    if cond.texts is None:
        raise ValueError("the condition is the same at all steps")
    which = jnp.take(cond.texts.steps, step, axis=2, mode="clip")

    def read(x: jax.Array) -> jax.Array:
        return jax.vmap(jax.vmap(lambda texts, i: texts[i]))(x, which)

    def beside(x: jax.Array) -> jax.Array:
        return jnp.repeat(x[:, None], which.shape[1], axis=1)

    return Cond(
        context=jax.tree.map(read, cond.context),
        concat=jax.tree.map(beside, cond.concat),
        label=jax.tree.map(beside, cond.label),
        kv_cache=jax.tree.map(read, cond.kv_cache),
    )


class Sizes(NamedTuple):
    """Shapes of one image and of its latent."""

    image: tuple[int, int, int]
    latent: tuple[int, int, int]


class Example(NamedTuple):
    """Shape and type of an array of a batch, without the batch axis."""

    shape: tuple[int, ...]
    dtype: DTypeLike


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of conditioning. `config` is the kind's own dataclass of `schema`."""

    name: Callable[[Any], str]
    """name(config): the condition as users call it."""
    example: Callable[[Any, Sizes], dict[str, Example]]
    """example(config, sizes) -> {name: Example} of all that a batch must hold."""
    from_batch: Callable[..., Cond]
    """from_batch(config, module, params, batch, encode, dropped) -> Cond, null where `dropped`."""
    sampled_by: Callable[[Any], str] = lambda config: ""
    """sampled_by(config): task of `ldm-sample`, and what it must be given; "" without a task."""
    build: Callable[[Any, DTypeLike, bool], nn.Module | None] = lambda config, dtype, remat: None
    """build(config, dtype, remat) -> the module with the learned part, None without one."""
    module_input: Callable[[Any], tuple[int, ...]] = lambda config: (1,)
    """module_input(config): shape of the int32 array that initializes the module."""
    context_width: Callable[[Any], tuple[str, int] | None] = lambda config: None
    """context_width(config) -> (field, width of the context tokens), None without context."""
    concat_channels: Callable[[Any, int, int], int] = lambda config, latent, image: 0
    """concat_channels(config, latent channels, image channels): added to the latent's."""
    label_ids: Callable[[Any], int | None] = lambda config: None
    """label_ids(config): ids that `Cond.label` takes, None where the kind gives no label."""
    check: Callable[[Any, schema.UNetConfig, schema.FirstStageModelConfig, str], None] = (
        lambda config, unet, first_stage, at: None
    )
    """check(config, unet, first_stage, field): ValueError if they do not fit the kind."""
    has_null: Callable[[Any], bool] = lambda config: True
    """has_null(config): there is a null condition, so that guidance is possible."""
    instead: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """{name of `example`: another name that a batch may hold in its place}."""
    check_values: Callable[[Any, Batch], None] = lambda config, batch: None
    """check_values(config, batch): ValueError for values out of range, where they are known."""
    check_classes: Callable[[Any, int], None] = lambda config, num_classes: None
    """check_classes(config, num_classes): ValueError if data of so many classes do not fit it."""
    in_turn: Callable[[Any, int], dict[str, Any] | None] = lambda config, count: None
    """in_turn(config, count): a batch without data, as of every class in turn; None: needs data."""


def where_dropped(dropped: Dropped, null: jax.Array, given: jax.Array) -> jax.Array:
    """`null` in the examples that are dropped, `given` in the others; both [B, ...]."""
    dropped = jnp.broadcast_to(dropped, given.shape[:1])
    return jnp.where(dropped.reshape(-1, *(1,) * (given.ndim - 1)), null, given)


def concat(x: jax.Array, dropped: Dropped, label: jax.Array | None = None) -> Cond:
    """Cond of channels beside the latent, whose null is zeros."""
    return Cond(concat=where_dropped(dropped, jnp.zeros_like(x), x), label=label)
