"""Gradients, optimizer, moving average and skipped steps, against values worked out apart."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax import schema, sharding, train_state
from ldm_jax.schema import EMAConfig, OptimizerConfig

PARAMS = {
    "unet": {"dense": {"kernel": np.linspace(-1, 1, 12).reshape(4, 3), "bias": np.ones(3)}},
    "cond_stage": {"table": np.arange(6.0).reshape(2, 3)},
    "logvar": np.zeros(5),
}
PARAMS = jax.tree.map(lambda x: x.astype(np.float32), PARAMS)


def gradient_of(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), PARAMS)


def tree_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- optimizer ----------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(learning_rate=1e-2),
        OptimizerConfig(learning_rate=4.5e-3, b1=0.5, b2=0.9, weight_decay=0.3, eps=1e-3),
    ],
)
def test_five_steps_of_adamw_as_in_torch(config):
    torch = pytest.importorskip("torch", reason="the reference optimizer")
    theirs = [torch.nn.Parameter(torch.tensor(x)) for x in jax.tree.leaves(PARAMS)]
    reference = torch.optim.AdamW(
        theirs, config.learning_rate, (config.b1, config.b2), config.eps, config.weight_decay
    )
    tx, _ = train_state.make_optimizer(config)
    ours, opt_state = PARAMS, tx.init(PARAMS)
    for step in range(5):
        grads = gradient_of(step)
        updates, opt_state = tx.update(grads, opt_state, ours)
        ours = optax.apply_updates(ours, updates)
        for parameter, g in zip(theirs, jax.tree.leaves(grads)):
            parameter.grad = torch.tensor(g)
        reference.step()
    for a, b in zip(jax.tree.leaves(ours), theirs):
        np.testing.assert_allclose(a, b.detach().numpy(), atol=1e-6, rtol=1e-6)


def test_clip_norm_scales_the_whole_gradient():
    grads = gradient_of(0)
    norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in jax.tree.leaves(grads)))
    tx, _ = train_state.make_optimizer(OptimizerConfig(clip_norm=0.5))
    _, opt_state = tx.update(grads, tx.init(PARAMS), PARAMS)
    for mu, g in zip(jax.tree.leaves(optax.tree.get(opt_state, "mu")), jax.tree.leaves(grads)):
        np.testing.assert_allclose(mu, 0.1 * g * 0.5 / norm, rtol=1e-5)  # first moment: (1 - b1) g


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (OptimizerConfig(learning_rate=2.0), {0: 2, 1: 2, 10**6: 2}),
        (OptimizerConfig(learning_rate=2.0, warmup_steps=4), {0: 0.5, 1: 1, 3: 2, 4: 2, 99: 2}),
        (OptimizerConfig(learning_rate=2.0, schedule="linear", warmup_steps=2, decay_steps=12),
         {0: 1, 1: 2, 2: 2, 7: 1, 12: 0, 20: 0}),
        (OptimizerConfig(learning_rate=2.0, schedule="cosine", decay_steps=12, final_fraction=0.1),
         {0: 2, 3: 0.2 + 1.8 * 0.5 * (1 + np.sqrt(0.5)), 6: 1.1, 12: 0.2, 50: 0.2}),
    ],
)  # fmt: skip
def test_learning_rate(config, expected):
    _, learning_rate = train_state.make_optimizer(config)
    found = {n: float(jax.jit(learning_rate)(n)) for n in expected}
    assert found == pytest.approx(expected, abs=1e-6)


def test_optimizer_uses_its_learning_rate():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, weight_decay=0.0)
    tx, learning_rate = train_state.make_optimizer(config)
    opt_state, ones = tx.init(PARAMS), jax.tree.map(np.ones_like, PARAMS)
    for n in range(6):  # a constant gradient makes Adam's step -rate
        updates, opt_state = tx.update(ones, opt_state, PARAMS)
        np.testing.assert_allclose(updates["logvar"], -learning_rate(n) * np.ones(5), rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimizerConfig(schedule="cosine"), "'cosine' needs decay_steps above warmup_steps 0"),
        (OptimizerConfig(schedule="linear", warmup_steps=9, decay_steps=9), "not 9"),
        (OptimizerConfig(decay_steps=100), "decay_steps 100 has no effect"),
        (OptimizerConfig(clip_norm=0.0), "clip_norm 0.0"),
        (OptimizerConfig(learning_rate=-1e-4), "optimizer.learning_rate -0.0001 is not a finite"),
        (OptimizerConfig(learning_rate=math.nan), "optimizer.learning_rate nan is not a finite"),
        (OptimizerConfig(learning_rate=math.inf), "optimizer.learning_rate inf is not a finite"),
        (OptimizerConfig(weight_decay=math.nan), "optimizer.weight-decay nan is not a finite"),
    ],
)
def test_make_optimizer_refuses(config, message):
    with pytest.raises(ValueError, match=message):
        train_state.make_optimizer(config)


# --- moving average -----------------------------------------------------------------------------


def test_ema_decay_is_that_of_the_reference():
    config = EMAConfig(decay=0.9999)
    assert float(train_state.ema_decay(config, 1)) == pytest.approx(2 / 11)
    assert float(train_state.ema_decay(config, 2)) == pytest.approx(3 / 12)
    assert float(train_state.ema_decay(config, 80_000)) == pytest.approx(80001 / 80010, abs=1e-7)
    assert float(train_state.ema_decay(config, 100_000)) == pytest.approx(0.9999, abs=1e-7)
    assert float(train_state.ema_decay(EMAConfig(decay=0.5, warmup=False), 1)) == 0.5


def test_update_ema_over_three_steps():
    config = EMAConfig()
    ema = train_state.init_ema(config, PARAMS)
    tree_equal(ema, {part: PARAMS[part] for part in ("unet", "cond_stage")})
    expected = PARAMS["unet"]["dense"]["kernel"].astype(np.float64)
    for step in range(3):
        params = gradient_of(step)
        ema = train_state.update_ema(config, ema, params, jnp.asarray(step, jnp.int32))
        decay = (2 + step) / (11 + step)
        expected = decay * expected + (1 - decay) * params["unet"]["dense"]["kernel"]
    assert set(ema) == {"unet", "cond_stage"}
    np.testing.assert_allclose(ema["unet"]["dense"]["kernel"], expected, atol=1e-6)


def test_ema_of_named_parts_only():
    assert set(train_state.init_ema(EMAConfig(parts=("unet",)), PARAMS)) == {"unet"}
    assert train_state.init_ema(EMAConfig(parts=()), PARAMS) == {}
    with pytest.raises(ValueError, match="'Unet' is not one of unet"):
        train_state.init_ema(EMAConfig(parts=("Unet",)), PARAMS)


def test_a_fresh_state_shares_no_buffer_so_it_can_be_donated():
    tx, _ = train_state.make_optimizer(OptimizerConfig())
    params = jax.tree.map(jnp.asarray, PARAMS)
    for create in (train_state.create, train_state.create_gan):
        state = create(params, tx, EMAConfig())
        pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
        assert len(set(pointers)) == len(pointers)
        assert int(state.step) == int(state.bad_steps) == 0
    assert state.disc_params == state.disc_opt_state == {}


# --- keys ---------------------------------------------------------------------------------------


def data_of(keys):
    return jax.tree.map(lambda k: jax.random.key_data(k).tolist(), keys)


def test_step_keys_depend_on_key_step_and_their_own_name():
    root = jax.random.key(7)
    keys = data_of(train_state.step_keys(root, 3, ("noise", "t")))
    assert keys["noise"] != keys["t"]
    assert keys["noise"] == data_of(train_state.step_keys(root, 3, ("drop", "noise")))["noise"]
    assert keys["noise"] != data_of(train_state.step_keys(root, 4, ("noise",)))["noise"]
    other = train_state.step_keys(jax.random.key(8), 3, ("noise",))
    assert keys["noise"] != data_of(other)["noise"]


def test_row_keys_depend_on_the_row_alone():
    key = jax.random.key(7)
    small, large = (data_of(train_state.example_keys(key, n)) for n in (3, 8))
    assert small == large[:3]
    assert len({tuple(k) for k in large}) == 8


# --- gradients ----------------------------------------------------------------------------------


def loss_fn(params, rows):
    """Depends on parameters, images and per-row keys; means over rows."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(rows["keys"])
    dense = params["unet"]["dense"]
    out = rows["image"] @ dense["kernel"] + dense["bias"][None] + noise
    out = out + params["cond_stage"]["table"][rows["label"]]
    loss = jnp.mean(jnp.square(out))
    return loss, {"mean": jnp.mean(out)}


def make_rows(batch):
    rng = np.random.default_rng(5)
    return {
        "image": rng.normal(size=(batch, 4)).astype(np.float32),
        "label": rng.integers(0, 2, batch),
        "keys": train_state.example_keys(jax.random.key(1), batch),
    }


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulation_equals_the_big_batch(accumulate):
    rows = make_rows(8)
    grads, metrics = train_state.gradients(loss_fn, PARAMS, rows, 1)
    assert float(optax.tree.norm(grads)) > 0.1
    assert set(metrics) == {"loss", "mean"}
    step = jax.jit(lambda p, r: train_state.gradients(loss_fn, p, r, accumulate))
    found = step(PARAMS, rows)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), found, (grads, metrics))


def test_microbatch_a_holds_rows_a_modulo_accumulate():
    def products(params, rows):
        return params * jnp.prod(rows), {}

    x = np.asarray([2.0, 3.0, 5.0, 7.0, 11.0, 13.0], np.float32)
    grad, metrics = train_state.gradients(products, jnp.float32(1), x, 2)
    assert float(grad) == (2 * 5 * 11 + 3 * 7 * 13) / 2
    assert float(metrics["loss"]) == float(grad)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_what_belongs_to_rows_comes_back_in_their_order(accumulate):
    def products(params, rows):
        by_row = {"double": 2 * rows, "row": rows.astype(jnp.int32)}
        return params * jnp.prod(rows), {"largest": jnp.max(rows), "examples": by_row}

    x = np.arange(1, 7, dtype=np.float32)
    _, metrics = jax.jit(lambda x: train_state.gradients(products, 1.0, x, accumulate))(x)
    np.testing.assert_array_equal(metrics["examples"]["double"], 2 * x)
    np.testing.assert_array_equal(metrics["examples"]["row"], x.astype(int))
    assert float(metrics["largest"]) == {1: 6, 3: (4 + 5 + 6) / 3}[accumulate]


def test_no_row_leaves_its_device():
    mesh = sharding.make_mesh(schema.MeshConfig(data=2, fsdp=2))
    rows = jax.device_put(make_rows(16), sharding.batch_sharding(mesh))
    params = jax.device_put(PARAMS, sharding.replicated(mesh))
    step = jax.jit(
        lambda p, r: train_state.gradients(loss_fn, p, r, 4),
        out_shardings=sharding.replicated(mesh),
    )
    program = step.lower(params, rows).compile().as_text()
    assert "all-reduce" in program  # of the gradient
    for moved in ("all-gather", "all-to-all", "collective-permute"):
        assert moved not in program


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="8 examples cannot be cut into 3 microbatches"):
        train_state.gradients(loss_fn, PARAMS, make_rows(8), 3)
    with pytest.raises(ValueError, match="0 microbatches"):
        train_state.gradients(loss_fn, PARAMS, make_rows(8), 0)


# --- skipped steps ------------------------------------------------------------------------------


def advance(config, state, loss, norm):
    new = jax.tree.map(lambda x: x + jnp.asarray(loss, x.dtype), state)
    return train_state.keep_or_skip(config, loss, [norm], new, state)


def fresh():
    tx, _ = train_state.make_optimizer(OptimizerConfig())
    return train_state.create(PARAMS, tx, EMAConfig())


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters():
    mesh = sharding.make_mesh(schema.MeshConfig())
    old = jax.device_put(fresh(), sharding.replicated(mesh))
    step = jax.jit(functools.partial(advance, schema.SpikeConfig()))
    state = old
    for count, bad in enumerate([(np.nan, 1.0), (1.0, np.inf), (-np.inf, np.nan)], start=1):
        state = step(state, *map(jnp.float32, bad))
        assert (int(state.step), int(state.bad_steps)) == (count, count)
        for part in ("params", "ema_params", "opt_state"):
            tree_equal(getattr(state, part), getattr(old, part))
        tree_equal(state.skips["norms"], old.skips["norms"])
    for shard in state.params["logvar"].addressable_shards:
        np.testing.assert_array_equal(shard.data, np.zeros(5))
    good = step(state, jnp.float32(1), jnp.float32(1))
    assert (int(good.step), int(good.bad_steps), int(good.skips["count"])) == (4, 0, 3)
    np.testing.assert_array_equal(good.params["logvar"], np.ones(5))
    assert good.step.dtype == good.bad_steps.dtype == good.skips["count"].dtype == jnp.int32


def run_norms(config, norms, state=None):
    """(state, [whether the step was kept]) after steps of these gradient norms."""
    step, kept = jax.jit(functools.partial(advance, config)), []
    state = fresh() if state is None else state
    for norm in norms:
        before = state
        state = step(state, jnp.float32(1), jnp.float32(norm))
        kept.append(float(state.params["logvar"][0]) > float(before.params["logvar"][0]))
    return state, kept


def test_a_spike_is_judged_by_the_mean_of_the_steps_before():
    config = schema.SpikeConfig(factor=3.0, decay=0.5, warmup=3)
    norms = [1, 5, 3, 9.01, 9, 18.1, 18.2, 18]
    state, kept = run_norms(config, norms)
    # after the warm-up the mean is 3; what is skipped does not move it
    assert kept == [True, True, True, False, True, False, False, True]
    assert (int(state.step), int(state.bad_steps), int(state.skips["count"])) == (8, 0, 3)
    np.testing.assert_allclose(state.skips["norms"]["mean"], [12.0])  # (3 + 9) / 2, (6 + 18) / 2
    np.testing.assert_array_equal(state.skips["norms"]["count"], [5])


def test_the_mean_is_kept_while_the_policy_is_off():
    state, kept = run_norms(schema.SpikeConfig(), [2, 4, 1000, 0])
    assert all(kept)
    np.testing.assert_allclose(state.skips["norms"]["mean"], [1006 / 3], rtol=1e-6)
    np.testing.assert_array_equal(state.skips["norms"]["count"], [3])  # 0: nothing was learned
    _, kept = run_norms(schema.SpikeConfig(factor=2.0, warmup=3), [700, 600], state)
    assert kept == [False, True]


@pytest.mark.parametrize("spiked", [0, 1])
def test_a_spike_of_either_network_skips_both(spiked):
    tx, _ = train_state.make_optimizer(OptimizerConfig())
    state = train_state.create_gan(
        PARAMS, tx, EMAConfig(), disc_params=jax.tree.map(jnp.asarray, PARAMS), disc_tx=tx
    )
    config = schema.SpikeConfig(factor=2.0, warmup=1)
    for norms in ([1.0, 10.0], [1.0, 10.0], [3.0, 10.0] if spiked == 0 else [1.0, 30.0]):
        before = state
        new = jax.tree.map(lambda x: x + jnp.ones_like(x), state)
        state = train_state.keep_or_skip(
            config, jnp.ones(()), list(map(jnp.float32, norms)), new, state
        )
    for part in ("params", "disc_params", "disc_opt_state", "ema_params"):
        tree_equal(getattr(state, part), getattr(before, part))
    np.testing.assert_allclose(state.skips["norms"]["mean"], [1, 10])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (schema.SpikeConfig(factor=0.5), "factor 0.5: 0 is off, else it must be above 1"),
        (schema.SpikeConfig(decay=1.0), r"decay 1.0 is not in \[0, 1\)"),
        (schema.SpikeConfig(warmup=0), "warmup 0"),
    ],
)
def test_a_policy_out_of_range_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        train_state.check_spikes(config)
