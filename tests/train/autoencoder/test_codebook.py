"""Quantized first stages in training: the codebook's average, codes that revive, usage."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes

from ldm_jax import schema
from ldm_jax.models import quantize
from ldm_jax.runtime import rundir
from ldm_jax.train import autoencoder
from ldm_jax.train.autoencoder import codebook

CONFIG = recipes.gan_config("vq", discriminator=None)


def embedding(params):
    return np.asarray(params["autoencoder"]["quantize"]["embedding"])


@pytest.fixture(scope="module")
def alone():
    """(state, metrics) after four steps on one device: codes nobody took have been revived."""
    return recipes.steps(CONFIG, recipes.mesh_of(), 4)


@pytest.mark.slow
def test_metrics_of_a_step_are_those_of_the_whole_batch(alone):
    _, metrics = alone
    assert {"codebook", "perplexity", "used_codes", "code_usage", "revived"} <= set(metrics[0])
    assert "kl" not in metrics[0]
    for found in metrics:
        assert 1 <= found["perplexity"] <= found["used_codes"] <= 32
        assert found["code_usage"] == found["used_codes"] / 32
        assert found["loss"] == pytest.approx(found["nll_loss"] + found["codebook"], rel=1e-5)
    assert metrics[0]["revived"] == 0
    assert metrics[1]["revived"] > 0  # idle for two steps
    expected = quantize.codebook_from(alone[0].codes["averages"])
    np.testing.assert_allclose(embedding(alone[0].params), expected, rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_on_four_devices_and_in_microbatches_equal_those_on_one(alone, accumulate):
    config = dataclasses.replace(CONFIG, accumulate=accumulate)
    state, metrics = recipes.steps(config, recipes.mesh_of(data=2, fsdp=2), 4)
    for part in ("params", "ema_params", "opt_state"):
        assert recipes.largest_difference(getattr(state, part), getattr(alone[0], part)) < 1e-5
    found, expected = jax.device_get((state.codes, alone[0].codes))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-5), found, expected
    )
    for a, b in zip(metrics, alone[1]):
        assert a == pytest.approx(b, rel=1e-4)


def update(config, params, opt_state, codes, z, indices):
    rows = {"z": z, "indices": indices}
    changed = jax.jit(functools.partial(codebook.update, config))
    return changed(params, opt_state, codes, rows, jax.random.key(5))


def test_idle_codes_move_to_latents_and_are_forgotten():
    loss = dataclasses.replace(CONFIG.loss, revive_codes_after=2)
    model = dataclasses.replace(CONFIG.model, codebook_decay=None)
    config = dataclasses.replace(CONFIG, loss=loss, model=model)
    codes_nc = jnp.arange(32.0 * 4).reshape(32, 4)
    params = {"autoencoder": {"quantize": {"embedding": codes_nc}, "other": jnp.ones(3)}}
    moments = {"mu": params, "count": jnp.ones((), jnp.int32)}
    state = codebook.start(config, params)
    assert list(state) == ["idle"]
    z = -1.0 - jnp.arange(2 * 4 * 4 * 4.0).reshape(2, 4, 4, 4)
    indices = jnp.zeros((2, 4, 4), jnp.int32).at[0, 0, 0].set(7)
    first = update(config, params, moments, state, z, indices)
    assert int(first.metrics["revived"]) == 0
    recipes.assert_same_bits(first.params, params)
    second = update(config, first.params, first.opt_state, first.codes, z, indices)
    assert int(second.metrics["revived"]) == 30
    new = embedding(second.params)
    np.testing.assert_array_equal(new[[0, 7]], codes_nc[np.array([0, 7])])
    rest = np.delete(new, [0, 7], axis=0)
    latents = {tuple(x) for x in np.asarray(z).reshape(-1, 4).tolist()}
    assert {tuple(x) for x in rest.tolist()} <= latents
    mu = embedding(second.opt_state["mu"])
    np.testing.assert_array_equal(mu[[0, 7]], codes_nc[np.array([0, 7])])
    assert not np.delete(mu, [0, 7], axis=0).any()
    ema = codebook.follow(jax.tree.map(jnp.zeros_like, params), second)
    assert not embedding(ema)[[0, 7]].any()
    np.testing.assert_array_equal(np.delete(embedding(ema), [0, 7], axis=0), rest)
    assert not np.asarray(second.codes["idle"]).any() or int(second.codes["idle"].max()) == 0


def test_a_codebook_with_an_average_follows_it():
    config = dataclasses.replace(
        CONFIG, loss=dataclasses.replace(CONFIG.loss, revive_codes_after=0)
    )
    codes_nc = jnp.arange(32.0 * 4).reshape(32, 4)
    params = {"autoencoder": {"quantize": {"embedding": codes_nc}}}
    state = codebook.start(config, params)
    z, indices = jnp.ones((1, 2, 2, 4)), jnp.full((1, 2, 2), 3)
    found = update(config, params, {}, state, z, indices)
    batch = quantize.assigned(z, indices, 32)
    averages = quantize.update_averages(quantize.start_averages(codes_nc), batch, 0.9)
    np.testing.assert_allclose(embedding(found.params), quantize.codebook_from(averages))
    assert found.replaced_n is None


@pytest.mark.slow
def test_a_run_resumes_with_its_codes_and_counts_usage_over_all_that_is_held_out(tmp_path):
    every = schema.IntervalConfig(log=1, save=2, snapshot=0, evaluate=4, sample=4)
    config = dataclasses.replace(CONFIG, intervals=every, steps=4)
    assert autoencoder.train(config, tmp_path / "whole") == 0
    assert autoencoder.train(dataclasses.replace(config, steps=2), tmp_path / "parts") == 0
    assert autoencoder.train(config, tmp_path / "parts") == 0
    runs = [rundir.read_metrics(tmp_path / name) for name in ("whole", "parts")]
    found = [[(m["step"], m["loss"], m["revived"]) for m in run if "loss" in m] for run in runs]
    assert found[0] == found[1]
    last = [m for m in runs[0] if "eval/loss" in m][-1]
    assert 0 < last["eval/code_usage"] <= 1
    assert last["eval/used_codes"] == 32 * last["eval/code_usage"]
    assert last["eval/perplexity_ema"] >= 1
