"""First stages against a discriminator: the step, its parts by hand, meshes, resuming."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recipes

from ldm_jax import losses, schema, train_state
from ldm_jax.models import discriminator, lpips
from ldm_jax.runtime import checkpoint, rundir
from ldm_jax.train import autoencoder
from ldm_jax.train.autoencoder import reconstruction

LOSS = schema.FirstStageLossConfig(
    disc_start=1, learn_logvar=True, lecam_weight=0.1, r1_weight=0.3, r1_interval=2
)
CONFIG = recipes.gan_config(loss=LOSS, spikes=recipes.SPIKES)
STEPS = 3
TOLERANCE = 1e-5
"""On parameters of about 1 after three steps."""


@pytest.fixture(scope="module")
def alone():
    """(state, metrics) after three steps on one device."""
    return recipes.steps(CONFIG, recipes.mesh_of(), STEPS)


def disc_of(state):
    return state.disc_params, state.disc_stats, state.disc_opt_state


# --- the step ------------------------------------------------------------------------------------


def by_hand(config, step, state, batch):
    """(autoencoder's gradients, discriminator's gradients, metrics) of a step, with plain autodiff.

    The adaptive weight comes from two more backward passes, as the reference computes it.
    """
    mesh, weights = recipes.mesh_of(), config.loss
    reconstruct = reconstruction.make(config, mesh)
    nll = reconstruction.make_nll(config)
    net = discriminator.from_config(config.discriminator)
    key = jax.random.fold_in(jax.random.key(config.seed), step.TRAIN)
    keys = train_state.step_keys(key, step, autoencoder.DRAWS)
    keys = {name: train_state.example_keys(k, config.batch_size) for name, k in keys.items()}
    image = batch["image"]
    factor = weights.disc_factor * (step >= weights.disc_start)

    def judge(params, stats, image):
        variables = {"params": params, "batch_stats": stats}
        logits, state = net.apply(variables, image, train=True, mutable=["batch_stats"])
        return logits, state["batch_stats"]

    def terms(params):
        found = reconstruct(params, image, keys["encode"], keys["dropout"][0], True)
        value, _ = nll({}, image, found.image, params["logvar"])
        fake, stats = judge(state.disc_params, state.disc_stats["batch_stats"], found.image)
        return value, -jnp.mean(fake), found.regularization, stats

    def last(which):
        def value(kernel):
            params = jax.tree.map(lambda x: x, state.params)
            params["autoencoder"]["decoder"]["conv_out"]["kernel"] = kernel
            return terms(params)[which]

        kernel = state.params["autoencoder"]["decoder"]["conv_out"]["kernel"]
        return jnp.linalg.norm(jax.grad(value)(kernel).reshape(-1))

    d_weight = jnp.clip(last(0) / (last(1) + 1e-4), 0, 1e4) * weights.disc_weight

    def loss(params):
        value, adversarial, regularization, stats = terms(params)
        return value + regularization + d_weight * factor * adversarial, stats

    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    tx, _ = train_state.make_optimizer(config.optimizer)
    updates, _ = tx.update(grads, state.opt_state, state.params)
    moved = optax.apply_updates(state.params, updates)
    found = reconstruct(moved, image, keys["disc_encode"], keys["disc_dropout"][0], True)

    def disc_loss(params):
        real, after = judge(params, stats, image)
        fake, after = judge(params, after, found.image)
        hinge = losses.hinge(real, fake)
        value = hinge + weights.lecam_weight * losses.lecam(state.disc_stats["lecam"], real, fake)
        if step % weights.r1_interval == 0:
            penalty = losses.r1(lambda x: judge(params, stats, x)[0], image)
            value += weights.r1_interval * weights.r1_weight * penalty
        return factor * value, (hinge, after, jnp.mean(real))

    disc_grads, (hinge, after, real) = jax.grad(disc_loss, has_aux=True)(state.disc_params)
    metrics = {"loss": value, "d_weight": d_weight, "disc_loss": hinge, "logits_real": real}
    norms = {"grad_norm": optax.tree.norm(grads), "disc_grad_norm": optax.tree.norm(disc_grads)}
    disc_tx, _ = train_state.make_optimizer(config.optimizer)
    updates, _ = disc_tx.update(disc_grads, state.disc_opt_state, state.disc_params)
    return moved, optax.apply_updates(state.disc_params, updates), after, {**metrics, **norms}


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 2])
def test_a_step_is_that_written_by_hand(step):
    """Before the discriminator starts, and after it with both of its regularizations."""
    mesh = recipes.mesh_of()
    state = recipes.steps(CONFIG, mesh, step)[0] if step else recipes.start(CONFIG, mesh)
    batch = recipes.batch_of(CONFIG, mesh, step)
    before = jax.device_get(state)
    expected = jax.jit(functools.partial(by_hand, CONFIG, step))(state, batch)
    params, disc_params, stats, metrics = jax.device_get(expected)
    new, found = recipes.step_of(CONFIG, mesh)(state, batch, jax.random.key(CONFIG.seed))
    for name, value in metrics.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-4), name
    assert recipes.largest_difference(new.params, params) < TOLERANCE
    assert recipes.largest_difference(new.disc_params, disc_params) < TOLERANCE
    assert recipes.largest_difference(new.disc_stats["batch_stats"], stats) < TOLERANCE
    changed = recipes.largest_difference(new.disc_params, before.disc_params)
    assert changed > 1e-4 if step else changed == 0


def test_steps_move_every_parameter_and_statistic(alone):
    state, metrics = alone
    before = recipes.start(CONFIG, recipes.mesh_of())
    for name in ("params", "ema_params", "disc_params", "disc_stats"):
        flat, _ = jax.tree_util.tree_flatten_with_path(getattr(state, name))
        old = jax.tree.leaves(getattr(before, name))
        still = [jax.tree_util.keystr(p) for (p, a), b in zip(flat, old) if np.all(a == b)]
        assert not still
    assert set(metrics[-1]) == {
        "loss", "nll_loss", "rec_loss", "kl", "psnr", "g_loss", "d_weight", "disc_loss",
        "logits_real", "logits_fake", "lecam", "r1", "grad_norm", "disc_grad_norm",
        "learning_rate", "bad_steps", "skipped_steps",
    }  # fmt: skip
    assert [m["r1"] > 0 for m in metrics] == [False, False, True]  # steps 0 (too early), 1, 2


@pytest.mark.slow
def test_accumulated_steps_equal_those_of_the_batch_without_batch_statistics():
    """ActNorm whose first batch is behind it: then a microbatch changes nothing."""
    disc = schema.DiscriminatorConfig(width=8, layers=2, norm="act")
    loss = schema.FirstStageLossConfig(disc_start=0, disc_weight=0.0)
    found = []
    for accumulate in (1, 4):
        config = dataclasses.replace(CONFIG, discriminator=disc, loss=loss, accumulate=accumulate)
        mesh = recipes.mesh_of()
        state = recipes.start(config, mesh)
        stats = jax.tree.map(lambda x: jnp.ones_like(x), state.disc_stats)
        state, _ = recipes.steps(config, mesh, 2, state.replace(disc_stats=stats))
        found.append(state)
        norm = state.disc_stats["batch_stats"]["norm_1"]
        assert norm["initialized"].dtype == bool
        assert bool(norm["initialized"])
    assert recipes.largest_difference(found[0].params, found[1].params) < TOLERANCE
    assert recipes.largest_difference(found[0].disc_params, found[1].disc_params) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"remat": True}], ids=str)
def test_bfloat16_and_remat_stay_close(alone, changes):
    config = dataclasses.replace(CONFIG, **changes)
    state, metrics = recipes.steps(config, recipes.mesh_of(), STEPS)
    for a, b in zip(metrics, alone[1]):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
        assert a["disc_loss"] == pytest.approx(b["disc_loss"], rel=0.05)
    assert {x.dtype for x in jax.tree.leaves(state.disc_params)} == {jnp.dtype("float32")}


def test_a_poisoned_batch_leaves_the_discriminator_as_it_was():
    mesh = recipes.mesh_of()
    state, _ = recipes.steps(CONFIG, mesh, 2)
    before = jax.device_get((state.params, disc_of(state)))
    batch = recipes.batch_of(CONFIG, mesh, 2)
    batch = {**batch, "image": batch["image"].at[3, 5, 7, 1].set(jnp.nan)}
    state, _ = recipes.step_of(CONFIG, mesh)(state, batch, jax.random.key(CONFIG.seed))
    recipes.assert_same_bits((state.params, disc_of(state)), before)
    assert (int(state.step), int(state.bad_steps)) == (3, 1)


@pytest.mark.parametrize("network", [0, 1])
def test_a_spike_of_either_gradient_leaves_both_networks_as_they_were(network):
    mesh = recipes.mesh_of()
    state, made = recipes.steps(CONFIG, mesh, 2)
    norms = [sum(m[name] for m in made) for name in ("grad_norm", "disc_grad_norm")]
    usual = np.asarray(state.skips["norms"]["mean"])
    np.testing.assert_allclose(usual, [norms[0] / 2, norms[1]], rtol=1e-5)  # it starts at step 1
    before = jax.device_get((state.params, state.ema_params, state.opt_state, disc_of(state)))
    state, metrics = recipes.steps(CONFIG, mesh, 1, recipes.with_usual_norm(state, network, 1e-9))
    after = (state.params, state.ema_params, state.opt_state, disc_of(state))
    recipes.assert_same_bits(after, before)
    assert (int(state.step), int(state.bad_steps)) == (3, 1)
    assert (metrics[0]["skipped_steps"], metrics[0]["bad_steps"]) == (1, 1)


# --- the run -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "act"])
def test_a_run_in_two_parts_ends_as_one_in_one(tmp_path, norm):
    """Bit for bit: weights, average, discriminator, its statistics, both optimizers, metrics."""
    every = schema.IntervalConfig(log=1, save=2, snapshot=0, evaluate=4, sample=4)
    disc = schema.DiscriminatorConfig(width=8, layers=2, norm=norm)
    changes = {"discriminator": disc, "intervals": every, "steps": 4, "max_to_keep": 9}
    config = recipes.gan_config(loss=LOSS, **changes)
    assert autoencoder.train(config, tmp_path / "whole") == 0
    assert autoencoder.train(dataclasses.replace(config, steps=2), tmp_path / "parts") == 0
    parts = ("params", "ema_params", "opt_state", "disc_params", "disc_stats", "disc_opt_state")
    half, end = (checkpoint.restore_parts(tmp_path / "whole", n, parts) for n in (2, 4))
    for part in parts:
        assert recipes.largest_difference(half[part], end[part]) > 0
    assert autoencoder.train(config, tmp_path / "parts") == 0
    recipes.assert_same_bits(checkpoint.restore_parts(tmp_path / "parts", 4, parts), end)
    lines = [
        [(m["step"], m["loss"], m["disc_loss"]) for m in rundir.read_metrics(run) if "loss" in m]
        for run in (tmp_path / "whole", tmp_path / "parts")
    ]
    assert lines[0] == lines[1]
    evaluated = [m for m in rundir.read_metrics(tmp_path / "parts") if "eval/psnr_ema" in m]
    assert [m["step"] for m in evaluated][-1] == 4
    assert rundir.sample_path(tmp_path / "parts", 4).exists()


@pytest.mark.slow
def test_lpips_takes_part_and_random_features_need_no_file(tmp_path):
    loss = schema.FirstStageLossConfig(perceptual_weight=1.0, perceptual_vgg="random")
    config = recipes.first_stage_config(loss=loss, steps=2)
    assert autoencoder.train(config, tmp_path / "run") == 0
    first = rundir.read_metrics(tmp_path / "run")[0]
    mesh, params = recipes.mesh_of(), lpips.random_params(jax.random.key(0))
    image = recipes.batch_of(config, mesh, 0)["image"]
    assert first["perceptual"] > 0
    assert not (tmp_path / "run" / "frozen").exists()
    nll = reconstruction.make_nll(config)
    value, found = nll(params, image, image * 0.5, jnp.zeros(()))
    error = float(jnp.mean(jnp.abs(image * 0.5)))
    assert float(found["rec_loss"]) == pytest.approx(error + float(found["perceptual"]), rel=1e-5)
    assert float(value) == pytest.approx(float(found["rec_loss"]) * image[0].size, rel=1e-4)
