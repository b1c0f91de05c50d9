"""The recipe of the first stage: the same step on every mesh, skipped if it is not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes

from ldm_jax import schema, sharding
from ldm_jax.configs import tiny
from ldm_jax.runtime import checkpoint, rundir
from ldm_jax.train import autoencoder

CONFIG = recipes.first_stage_config(loss=schema.FirstStageLossConfig(learn_logvar=True))
TOLERANCE = 2e-6
"""On parameters of about 1 after five steps; a wrong mean or a wrong row costs 1e-4 and more."""


@pytest.fixture(scope="module")
def alone():
    """(state, metrics) after five steps on one device."""
    return recipes.steps(CONFIG, recipes.mesh_of(), 5)


@pytest.mark.parametrize(
    ("mesh", "accumulate"),
    [
        ({"data": 4}, 1),
        pytest.param({"fsdp": 4}, 2, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 2}, 1, marks=pytest.mark.slow),
        pytest.param({"fsdp": 2, "tensor": 2}, 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_five_steps_on_four_devices_equal_those_on_one(alone, mesh, accumulate, record_property):
    config = dataclasses.replace(CONFIG, accumulate=accumulate)
    state, metrics = recipes.steps(config, recipes.mesh_of(**mesh), 5)
    found = recipes.largest_difference(state, alone[0])
    record_property("largest_difference", found)
    assert found < TOLERANCE
    for a, b in zip(metrics, alone[1]):
        assert a == pytest.approx(b, rel=1e-5)
    kernel = state.params["autoencoder"]["encoder"]["conv_in"]["kernel"]
    split = mesh.get("fsdp", 1)
    assert kernel.addressable_shards[0].data.size * split == kernel.size


def test_steps_move_every_parameter_and_the_average(alone):
    state, metrics = alone
    before = recipes.start(CONFIG, recipes.mesh_of())
    for name in ("params", "ema_params"):
        flat, _ = jax.tree_util.tree_flatten_with_path(getattr(state, name))
        old = jax.tree.leaves(getattr(before, name))
        still = [jax.tree_util.keystr(p) for (p, a), b in zip(flat, old) if np.all(a == b)]
        assert not still
    assert int(state.step) == 5
    assert metrics[-1]["learning_rate"] == pytest.approx(1e-3)


def test_the_first_steps_are_the_recorded_ones(first_stage_run):
    """Update the numbers only with a change that is meant to alter init, data, loss or draws."""
    records = rundir.read_metrics(first_stage_run)[:3]
    assert [r["loss"] for r in records] == pytest.approx([342.560, 343.811, 250.915], rel=1e-3)
    assert records[0]["grad_norm"] == pytest.approx(672.068, rel=1e-3)
    assert records[0]["kl"] == pytest.approx(18.9837, rel=1e-3)


@pytest.mark.slow
def test_a_poisoned_batch_leaves_every_device_as_it_was(tmp_path):
    mesh = recipes.mesh_of(data=2, fsdp=2)
    state, _ = recipes.steps(CONFIG, mesh, 1)
    before = [jax.device_get([s.data for s in x.addressable_shards]) for x in _arrays(state)]
    batch = recipes.batch_of(CONFIG, mesh, 1)
    image = np.array(batch["image"])
    image[3, 5, 7, 1] = np.nan
    batch = {**batch, "image": jax.device_put(image, sharding.batch_sharding(mesh))}
    state, metrics = recipes.step_of(CONFIG, mesh)(state, batch, jax.random.key(CONFIG.seed))
    after = [jax.device_get([s.data for s in x.addressable_shards]) for x in _arrays(state)]
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert not np.isfinite(float(metrics["loss"]))
    assert (int(state.step), int(state.bad_steps), int(metrics["bad_steps"])) == (2, 1, 1)
    with checkpoint.manager(tmp_path) as manager:  # refuses whatever is not finite
        checkpoint.save(manager, state, {})
    state, _ = recipes.steps(CONFIG, mesh, 1, state)
    assert (int(state.step), int(state.bad_steps)) == (3, 0)
    assert not np.array_equal(_arrays(state)[0].addressable_shards[0].data, before[0][0])


@pytest.mark.slow
def test_bfloat16_stays_close_and_keeps_float32_parameters(alone):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    state, metrics = recipes.steps(config, recipes.mesh_of(), 3)
    for a, b in zip(metrics, alone[1]):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
        assert a["loss"] != b["loss"]
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_remat_gives_the_same_steps(alone):
    state, _ = recipes.steps(dataclasses.replace(CONFIG, remat=True), recipes.mesh_of(), 5)
    assert recipes.largest_difference(state, alone[0]) < TOLERANCE


def test_reconstruction_improves(first_stage_run):
    psnr = [r["psnr"] for r in rundir.read_metrics(first_stage_run) if "psnr" in r]
    assert np.mean(psnr[-3:]) > np.mean(psnr[:3]) + 1


def test_evaluation_is_the_same_twice_and_draws_nothing(alone):
    mesh = recipes.mesh_of()
    evaluate = autoencoder.make_eval_step(CONFIG, mesh)
    batch = recipes.batch_of(CONFIG, mesh, 0)
    first, second = (jax.device_get(evaluate(alone[0].params, batch)) for _ in range(2))
    assert first == second
    assert set(first) == {"loss", "rec_loss", "nll_loss", "kl", "psnr"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": dataclasses.replace(tiny.DATA, channels=1)}, "data.channels is 1"),
        ({"data": dataclasses.replace(tiny.DATA, size=15)}, "data.size 15 is not a multiple"),
    ],
)
def test_a_config_that_does_not_fit_its_data_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        autoencoder.train(dataclasses.replace(CONFIG, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _arrays(state):
    """Arrays that a skipped step may not change."""
    return jax.tree.leaves((state.params, state.ema_params, state.opt_state))
