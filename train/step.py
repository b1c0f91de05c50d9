"""One training step for every recipe: gradients, optimizer, moving average, skipped steps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from ldm_jax import schema, sharding, train_state

TRAIN = 1  # folded into the root key: the stream of keys that training draws from
DRAWS = ("encode", "t", "noise", "offset", "drop_cond", "dropout")  # of latent diffusion

Examples = dict[str, Any]  # {"batch": {name: [B, ...]}, "keys": {draw: [B] typed keys}}


@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
    """A loss and its properties that the step depends on; call it like its function.

    `function(frozen_params, params, examples, train) -> (mean loss, metrics)` of a microbatch;
    `examples` is {"batch": {name: [B, ...]}, "keys": {draw: [B] keys}}.
    """

    function: Callable[[Any, Any, Examples, bool], tuple[jax.Array, dict]]
    frozen: Any = dataclasses.field(default_factory=dict)
    """Arrays without a gradient, the loss's first argument; laid out by `sharding.RULES`."""
    draws: tuple[str, ...] = DRAWS
    """Names of the draws: an example has its own key for each."""
    per_example: bool = False
    """No draw and no normalization of an example depends on others: each device then computes its
    own examples on whole parameters, and only parameters and gradients are sent."""
    gathers: bool = False
    """The function itself gathers its parameters along fsdp: `sharding.all_gather`."""

    def __call__(self, frozen_params: Any, params: Any, examples: Examples, train: bool) -> tuple:
        return self.function(frozen_params, params, examples, train)


class Step:
    """step(state, batch, key) -> (state, metrics), jitted; donates its input state.

    `key` is the run's root key: with `state.step` and the example's number it determines every
    draw. Every metric is a scalar on all devices.
    """

    def __init__(self, function: Callable, frozen: Any, mesh: Mesh) -> None:
        self.function, self.frozen, self.mesh = function, frozen, mesh
        self._jitted: Any = None

    def jitted(self, state: Any) -> Any:
        """The jitted function of (frozen, state, batch, key), for states of this structure."""
        if self._jitted is None:
            shapes = jax.eval_shape(lambda x: x, state)
            shardings = sharding.by_rules(shapes, sharding.RULES, self.mesh)
            outputs = (shardings, sharding.replicated(self.mesh))
            self._jitted = jax.jit(self.function, donate_argnums=1, out_shardings=outputs)
        return self._jitted

    def __call__(self, state: Any, batch: dict, key: jax.Array) -> tuple[Any, dict]:
        return self.jitted(state)(self.frozen, state, batch, key)

    def trace(self, state: Any, batch: dict, key: jax.Array) -> Any:
        """As `jax.jit(...).trace`, of arrays or shapes with shardings."""
        return self.jitted(state).trace(self.frozen, state, batch, key)


def make_step(
    loss: Callable,
    tx: optax.GradientTransformation,
    config: schema.BaseTrainConfig,
    mesh: Mesh,
    *,
    with_state: Callable[[Any, Any], Any] | None = None,
    finish: Callable[..., tuple] | None = None,
) -> Step:
    """The training step of a loss and an optimizer, for a state as `train_state.create` makes it.

    loss: a `Loss`, or a function as its `function`, which then has nothing frozen.
    config: batch_size, accumulate, dtype, optimizer (the rate that is reported), ema and spikes.
    with_state: with_state(frozen, state) -> the loss's first argument; default: `frozen`.
    finish: finish(old, new, metrics, examples, key) -> (new, metrics, norms) after the optimizer,
    where `metrics["total"]`, if there, is judged in place of the loss, and `norms` are those of
    further gradients; default: the moving average follows (`average`).
    A step whose loss or gradient is not finite changes nothing: see `train_state.keep_or_skip`.
    """
    loss = loss if isinstance(loss, Loss) else Loss(loss)
    _, learning_rate = train_state.make_optimizer(config.optimizer)
    of_batch = _gradients(loss, config, mesh)
    finish = functools.partial(average, config.ema) if finish is None else finish

    def step(frozen: Any, state: Any, batch: dict, key: jax.Array) -> tuple[Any, dict]:
        key = jax.random.fold_in(key, TRAIN)
        examples = with_keys(key, state.step, loss.draws, batch, config.batch_size)
        given = frozen if with_state is None else with_state(frozen, state)
        grads, metrics = of_batch(given, state.params, examples)
        norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        # before the step is judged: a second model's loss and gradients count too
        new, metrics, norms = finish(state, new, metrics, examples, key)
        judged = metrics.pop("total", metrics["loss"])
        new = train_state.keep_or_skip(config.spikes, judged, [norm, *norms], new, state)
        return new, metrics | {
            "grad_norm": norm,
            "learning_rate": learning_rate(state.step - state.skips["count"]),  # updates made
            "bad_steps": new.bad_steps,
            "skipped_steps": new.skips["count"],
        }

    return Step(step, loss.frozen, mesh)


def average(
    ema: schema.EMAConfig, old: Any, new: Any, metrics: dict, examples: Examples, key: jax.Array
) -> tuple[Any, dict, list]:
    """The new state with its moving average updated."""
    ema_params = train_state.update_ema(ema, old.ema_params, new.params, old.step)
    return new.replace(ema_params=ema_params), metrics, []


def with_keys(
    key: jax.Array, step: jax.Array | int, draws: tuple[str, ...], batch: dict, batch_size: int
) -> Examples:
    """The batch, and for each draw the key of every example, at this step."""
    keys = train_state.step_keys(key, step, draws)
    return {
        "batch": batch,
        "keys": {name: train_state.example_keys(k, batch_size) for name, k in keys.items()},
    }


def _gradients(loss: Loss, config: schema.BaseTrainConfig, mesh: Mesh) -> Callable:
    """gradients(frozen, params, examples) -> (mean gradient, mean metrics) over all devices."""

    def gradients(frozen: Any, params: Any, examples: Examples) -> tuple[Any, dict]:
        return train_state.gradients(
            lambda params, examples: loss(frozen, params, examples, True),
            params,
            examples,
            config.accumulate,
        )

    if loss.per_example:
        # sums over microbatches are float32, and are sent so: bfloat16 would lose small gradients
        dtype = config.dtype if config.accumulate == 1 else "float32"
        return sharding.data_parallel_gradients(gradients, mesh, dtype)
    if loss.gathers:
        return gradients

    def on_whole(frozen: Any, params: Any, examples: Examples) -> tuple[Any, dict]:
        frozen, params = sharding.all_gather((frozen, params), mesh)
        return gradients(frozen, params, examples)

    return on_whole
