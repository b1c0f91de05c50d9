"""Training state, arrays alone, and its updates: gradients, AdamW, moving average."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ldm_jax import finite, schema

PARTS = (
    "unet",
    "cond_stage",
    "logvar",
    "autoencoder",
    "lora",
    "embedding",
)  # names that a config may average


@flax.struct.dataclass
class TrainState:
    """A latent diffusion model in training; model, optimizer and schedule are closed over."""

    step: jax.Array
    """int32: steps made, the only cursor of data, keys and schedules."""
    params: dict
    """{"unet", "cond_stage", "logvar"}: only the parts that train, float32."""
    ema_params: dict
    """The same keys, for the parts named in the config."""
    opt_state: Any
    bad_steps: jax.Array
    """int32: steps in a row that changed nothing; see `keep_or_skip`."""
    skips: dict
    """{"count": int32, steps skipped in all; "norms": {"mean": float32 [n], "count": int32 [n]}}:
    running mean of gradient norms, and the steps it is of; n is 1, or 2 in a `GanState`."""


@flax.struct.dataclass
class GanState:
    """A first stage in training, with its discriminator; without one `disc_*` are empty dicts."""

    step: jax.Array
    params: dict
    """{"autoencoder", "logvar"}: the latter only if it is learned."""
    ema_params: dict
    opt_state: Any
    disc_params: dict
    disc_stats: dict
    """{"batch_stats", "lecam"}: running statistics of the discriminator; the latter if used."""
    disc_opt_state: Any
    codes: dict
    """{"idle", "averages"} of a codebook: the former if codes are revived, the latter if it follows
    a moving average."""
    bad_steps: jax.Array
    skips: dict


def create(params: dict, tx: optax.GradientTransformation, ema: schema.EMAConfig) -> TrainState:
    """The state before the first step."""
    zero = jnp.zeros((), jnp.int32)  # copied below: no buffer of a donated state may occur twice
    return TrainState(
        zero, params, init_ema(ema, params), tx.init(params), jnp.copy(zero), _no_skips(1)
    )


def create_gan(
    params: dict,
    tx: optax.GradientTransformation,
    ema: schema.EMAConfig,
    *,
    disc_params: dict | None = None,
    disc_tx: optax.GradientTransformation | None = None,
    disc_stats: dict | None = None,
    codes: dict | None = None,
) -> GanState:
    """The state of a first stage before the first step; without `disc_tx` no discriminator."""
    zero = jnp.zeros((), jnp.int32)
    return GanState(
        step=zero,
        params=params,
        ema_params=init_ema(ema, params),
        opt_state=tx.init(params),
        disc_params=disc_params or {},
        disc_stats=disc_stats or {},
        disc_opt_state=disc_tx.init(disc_params) if disc_tx is not None else {},
        codes=codes or {},
        bad_steps=jnp.copy(zero),
        skips=_no_skips(2),
    )


def _no_skips(networks: int) -> dict:
    norms = {"mean": jnp.zeros(networks), "count": jnp.zeros(networks, jnp.int32)}
    return {"count": jnp.zeros((), jnp.int32), "norms": norms}


# --- keys ---------------------------------------------------------------------------------------


def step_keys(key: jax.Array, step: jax.Array | int, names: Sequence[str]) -> dict[str, jax.Array]:
    """{name: key of this step}. A key depends on its own name, not on the other names."""
    key = jax.random.fold_in(key, step)
    # crc32, not hash(), which differs between processes
    return {name: jax.random.fold_in(key, zlib.crc32(name.encode())) for name in names}


def example_keys(key: jax.Array, batch_size: int) -> jax.Array:
    """[B] keys: that of example r is a function of `key` and r alone, on every mesh."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size))


# --- gradients ----------------------------------------------------------------------------------


def gradients(
    loss_fn: Callable[[Any, Any], tuple[jax.Array, dict]],
    params: Any,
    examples: Any,
    accumulate: int,
) -> tuple[Any, dict]:
    """(gradient, metrics with "loss") of `loss_fn(params, examples) -> (mean loss, metrics)`.

    `examples` is any tree of [B, ...] arrays (typed keys too). Microbatch a holds those numbered
    a::accumulate, so that a batch split over devices in blocks is cut inside every block and no
    example changes its device. Gradient and metrics are means over the microbatches, which are
    equally large; but what `metrics` holds under "examples", [B / accumulate, ...] arrays, comes
    back as [B, ...].
    ValueError if B is not a multiple of `accumulate`.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def one(examples: Any) -> tuple[Any, dict]:
        (loss, metrics), grads = grad_fn(params, examples)
        return grads, {**metrics, "loss": loss}

    if accumulate == 1:
        return one(examples)
    for leaf in jax.tree.leaves(examples):
        if accumulate < 1 or leaf.shape[0] % accumulate:
            raise ValueError(
                f"a batch of {leaf.shape[0]} examples cannot be cut into {accumulate} microbatches:"
                " change batch_size or accumulate"
            )
    cut = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]), examples)

    def microbatch(a: jax.Array | int) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, a, 1, keepdims=False), cut)

    def parts(examples: Any) -> tuple[Any, Any]:
        grads, metrics = one(examples)
        return (grads, {n: m for n, m in metrics.items() if n != "examples"}), metrics.get(
            "examples", {}
        )

    def add(total: Any, a: jax.Array) -> tuple[Any, Any]:
        sums, by_example = parts(microbatch(a))
        return jax.tree.map(jnp.add, total, sums), by_example

    shapes, _ = jax.eval_shape(lambda: parts(microbatch(0)))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, by_example = jax.lax.scan(add, zeros, jnp.arange(accumulate))
    grads, metrics = jax.tree.map(lambda x: x / accumulate, total)
    if jax.tree.leaves(by_example):  # [accumulate, B / accumulate, ...]
        metrics["examples"] = jax.tree.map(
            lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), by_example
        )
    return grads, metrics


# --- skipped steps -------------------------------------------------------------------------------


def check_spikes(config: schema.SpikeConfig) -> None:
    """ValueError for a number that is out of range."""
    if config.factor and not config.factor > 1:
        raise ValueError(f"spikes.factor {config.factor}: 0 is off, else it must be above 1")
    if not 0 <= config.decay < 1:
        raise ValueError(f"spikes.decay {config.decay} is not in [0, 1)")
    if config.warmup < 1:
        raise ValueError(f"spikes.warmup {config.warmup}: a mean is of at least 1 step")


def keep_or_skip(
    config: schema.SpikeConfig, loss: jax.Array, norms: Sequence[jax.Array], new: Any, old: Any
) -> Any:
    """Return `new` if the step was sound; else `old`, one step on and counted as skipped.

    `norms` are the gradient norms of the state's networks. A step is not sound if loss or a norm is
    not finite, or if a norm exceeds `config.factor` times its running mean. The step counts either
    way: the next one reads the next batch. All of it is global, so every device decides alike. The
    mean takes in sound steps only, also while the policy is off, so that it may be switched on at
    any resume; a norm of 0, of a discriminator that has not started, is left out.
    """
    norms_n, usual = jnp.stack(norms), old.skips["norms"]
    sound = jnp.isfinite(loss) & jnp.all(jnp.isfinite(norms_n))
    if config.factor:
        judged = usual["count"] >= config.warmup
        sound &= ~jnp.any(judged & (norms_n > config.factor * usual["mean"]))
    kept = jax.tree.map(lambda n, o: jnp.where(sound, n, o), new, old)

    taken = sound & (norms_n > 0)
    count = usual["count"] + taken
    # a plain mean at first, until 1 / count falls to the rate of the moving average
    rate = jnp.maximum(1 - config.decay, 1 / jnp.maximum(count, 1).astype(norms_n.dtype))
    mean = usual["mean"] + jnp.where(taken, rate * (norms_n - usual["mean"]), 0.0)
    return kept.replace(
        step=old.step + 1,
        bad_steps=jnp.where(sound, jnp.zeros_like(old.step), old.bad_steps + 1),
        skips={"count": old.skips["count"] + ~sound, "norms": {"mean": mean, "count": count}},
    )


# --- optimizer ----------------------------------------------------------------------------------


def make_optimizer(
    config: schema.OptimizerConfig,
) -> tuple[optax.GradientTransformation, Callable[[Any], jax.Array]]:
    """(AdamW as in torch, its learning rate as a function of the number of updates before).

    The transformation clips (if asked), scales by the learning rate, and decays every parameter.
    ValueError if the decay of the learning rate has no end.
    """
    check_optimizer(config)
    learning_rate = _learning_rate(config)
    adamw = optax.adamw(
        learning_rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay
    )
    if config.clip_norm is None:
        return adamw, learning_rate
    if config.clip_norm <= 0:
        raise ValueError(f"optimizer.clip_norm {config.clip_norm} is not positive; None: no limit")
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw), learning_rate


def check_optimizer(config: schema.OptimizerConfig, name: str = "optimizer") -> None:
    """ValueError for a rate that is not finite or below 0, and for other numbers not finite."""
    for field, least in (("learning_rate", 0), ("eps", 0), ("final_fraction", 0)):
        finite.checked(getattr(config, field), f"{name}.{field}", least=least)
    finite.check_fields(config, name)


def _learning_rate(config: schema.OptimizerConfig) -> Callable[[Any], jax.Array]:
    """Rate of update n = 0, 1, ...: linear to the peak, reached at n = warmup_steps - 1."""
    warmup, decay = config.warmup_steps, config.decay_steps
    if config.schedule == "constant":
        if decay is not None:
            raise ValueError(
                f"optimizer.decay_steps {decay} has no effect with schedule 'constant': choose"
                " 'cosine' or 'linear', or leave it None"
            )
    elif decay is None or decay <= warmup:
        raise ValueError(
            f"optimizer.schedule {config.schedule!r} needs decay_steps above warmup_steps"
            f" {warmup}, not {decay}: set it to the step at which the decay ends"
        )

    def learning_rate(n: Any) -> jax.Array:
        rate = jnp.asarray(config.learning_rate, jnp.float32)
        if warmup:
            rate = rate * jnp.minimum(1.0, (n + 1) / warmup)
        if config.schedule == "constant":
            return rate
        done = jnp.clip((n - warmup) / ((decay or 0) - warmup), 0.0, 1.0)
        left = 0.5 * (1 + jnp.cos(jnp.pi * done)) if config.schedule == "cosine" else 1 - done
        return rate * (config.final_fraction + (1 - config.final_fraction) * left)

    return learning_rate


# --- moving average -----------------------------------------------------------------------------


def init_ema(config: schema.EMAConfig, params: dict) -> dict:
    """Copies of the parts that are averaged: those named in the config that this model trains.

    ValueError if the config names a part that no model has.
    """
    for part in config.parts:
        if part not in params and part not in PARTS:
            raise ValueError(f"ema.parts: {part!r} is not one of {', '.join(PARTS)}")
    # copies: the step donates its state, and one buffer cannot be given away twice
    return {part: jax.tree.map(jnp.copy, params[part]) for part in config.parts if part in params}


def ema_decay(config: schema.EMAConfig, n: jax.Array | int) -> jax.Array:
    """Decay of update n = 1, 2, ...: at most (1 + n) / (10 + n) in the warm-up, as in `ema.py`."""
    n = jnp.asarray(n, jnp.float32)
    decay = jnp.asarray(config.decay, jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n)) if config.warmup else decay


def update_ema(
    config: schema.EMAConfig, ema_params: dict, params: dict, step: jax.Array | int
) -> dict:
    """The average after the update made at `step` = 0, 1, ...; `params` may hold more parts."""
    rate = 1 - ema_decay(config, step + 1)
    current = {part: params[part] for part in ema_params}
    return jax.tree.map(lambda e, p: e + rate * (p - e), ema_params, current)
