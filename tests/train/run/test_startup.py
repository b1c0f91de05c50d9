"""Where a run begins: at fresh weights, or at those that a conversion put there."""

import dataclasses

import jax
import numpy as np
import pytest
import recipes

from ldm_jax.runtime import checkpoint, rundir
from ldm_jax.runtime.log import LOG
from ldm_jax.train import autoencoder, ldm
from ldm_jax.train.autoencoder import initial
from ldm_jax.train.ldm import initial as ldm_initial
from ldm_jax.train.run import startup

CONFIG = recipes.ldm_config()


@pytest.fixture
def fresh():
    """(state, shardings) before the first step, on one device."""
    mesh = recipes.mesh_of()
    state, (_, shardings) = recipes.start(CONFIG, mesh), ldm.abstract_state(CONFIG, mesh)
    return state, shardings


def test_a_converted_model_trains_on(fresh, tmp_path, caplog):
    """Its snapshot is of step 0, in any type of the weights."""
    caplog.set_level("INFO", logger=LOG.name)
    state, shardings = fresh
    given = jax.tree.map(lambda x: (2 * np.asarray(x)).astype(np.float16), state.params)
    checkpoint.save_snapshot(tmp_path, 0, given, {})
    found = ldm_initial.begin(CONFIG, tmp_path, state, shardings, recipes.mesh_of())
    wanted = jax.tree.map(np.float32, given)
    recipes.assert_same_bits(found.params, wanted)
    recipes.assert_same_bits(found.ema_params, {part: wanted[part] for part in state.ema_params})
    assert int(found.step) == 0
    assert caplog.messages == [f"starts from the weights in {tmp_path}/snapshots/0"]


def test_without_a_snapshot_the_weights_are_fresh(fresh, tmp_path):
    assert ldm_initial.begin(CONFIG, tmp_path, *fresh, recipes.mesh_of()) is fresh[0]


def test_a_run_that_lost_its_checkpoints_says_that_it_begins_anew(fresh, tmp_path, caplog):
    state, shardings = fresh
    manager = checkpoint.manager(tmp_path)
    assert startup.resume(tmp_path, manager, state, shardings) is None
    assert not caplog.messages
    checkpoint.save_snapshot(tmp_path, 12, state.params, {})
    assert startup.resume(tmp_path, manager, state, shardings) is None
    assert ldm_initial.begin(CONFIG, tmp_path, state, shardings, recipes.mesh_of()) is state
    assert "has no checkpoint, and begins anew at step 0; its snapshots, the last of step 12" in (
        caplog.text
    )


def test_weights_of_another_model_are_refused(fresh, tmp_path):
    cond = {**jax.device_get(fresh[0].params)["cond_stage"], "more": np.zeros(3)}
    checkpoint.save_snapshot(tmp_path, 0, {"cond_stage": cond}, {})
    with pytest.raises(ValueError, match=r"snapshots/0/params: is of another model, 1 arrays"):
        ldm_initial.begin(CONFIG, tmp_path, *fresh, recipes.mesh_of())


def test_a_converted_first_stage_trains_on(tmp_path):
    """With its codes: through what `--init-from` does."""
    config = recipes.first_stage_config()
    shapes, _ = autoencoder.abstract_state(config, recipes.mesh_of())
    assert initial.find(config, tmp_path, shapes) is None
    rundir.open_run(tmp_path, config)
    given = recipes.filled(shapes.params)
    checkpoint.save_snapshot(tmp_path, 0, given, {})
    found = initial.find(config, tmp_path, shapes)
    recipes.assert_same_bits(found.params, given["autoencoder"])
    other = dataclasses.replace(config, init_from="elsewhere")
    with pytest.raises(ValueError, match=r"--init-from elsewhere: .* has weights of its own"):
        initial.find(other, tmp_path, shapes)


@pytest.mark.parametrize(("width", "size", "warned"), [(32, 32, 1), (64, 32, 0), (32, 16, 0)])
def test_groups_of_one_channel_are_warned_of(width, size, warned, caplog):
    config = dataclasses.replace(
        CONFIG,
        data=dataclasses.replace(CONFIG.data, size=size),
        unet=dataclasses.replace(CONFIG.unet, model_channels=width),
    )
    startup.warn_of_single_channels(config)
    assert len(caplog.records) == warned
    assert all("--unet.model-channels 32" in record.getMessage() for record in caplog.records)
