"""load(path): the weights that were asked for, on the mesh that was asked for, or a clear error."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
from checkpoint_states import claim

from ldm_jax import loading, schema, sharding
from ldm_jax.runtime import checkpoint, rundir


def test_the_newest_snapshot_holds_the_average(ldm_run):
    model = loading.load(ldm_run)
    saved = checkpoint.restore_parts(ldm_run, 24, ("params", "ema_params", "opt_state"))
    for part in ("unet", "cond_stage"):
        recipes.assert_same_bits(model.params[part], saved["ema_params"][part])
    raw = loading.load(ldm_run, ema=False)
    for part in ("unet", "cond_stage"):
        recipes.assert_same_bits(raw.params[part], saved["params"][part])
    assert recipes.largest_difference(model.params["unet"], raw.params["unet"]) > 1e-4


@pytest.mark.parametrize("step", [4, 12])  # a checkpoint alone; a snapshot
def test_a_step_is_found_in_snapshots_and_checkpoints(ldm_run, step):
    saved = checkpoint.restore_parts(ldm_run, step, ("ema_params",))["ema_params"]
    assert checkpoint.snapshot_steps(ldm_run) == [12, 24]
    recipes.assert_same_bits(loading.load(ldm_run, step=step).params["unet"], saved["unet"])


def test_the_bundle_is_complete(ldm_run, first_stage_run):
    model = loading.load(ldm_run)
    config = rundir.read_config(ldm_run)
    assert model.latent_scale == json.loads((ldm_run / "latents.json").read_text())["scale"]
    assert model.prediction == "eps"
    assert model.latent_shape == (8, 8, 4)
    assert (model.config.unet, model.config.cond) == (config.unet, config.cond)
    assert len(model.schedule.betas) == 1000
    first_stage, stage_config = loading.load_first_stage(first_stage_run)
    assert stage_config == model.config.first_stage
    recipes.assert_same_bits(model.params["first_stage"], first_stage)
    x, t, context = jnp.zeros((1, 8, 8, 4)), jnp.zeros((1,)), jnp.zeros((1, 1, 32))
    shape = jax.eval_shape(model.unet.apply, {"params": model.params["unet"]}, x, t, context)
    assert shape.shape == (1, 8, 8, 4)


def test_dtype_is_that_of_the_computation(ldm_run):
    model = loading.load(ldm_run, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}
    assert model.unet.dtype == model.first_stage.dtype == jnp.bfloat16


def test_a_mesh_places_the_parameters_by_the_training_rules(ldm_run):
    mesh = sharding.make_mesh(schema.MeshConfig(data=1, fsdp=4))
    model = loading.load(ldm_run, mesh=mesh)
    kernel = model.params["unet"]["conv_in"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, None, None, "fsdp")
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    recipes.assert_same_bits(model.params, loading.load(ldm_run).params)


def test_what_is_not_there_is_an_error_with_its_name(ldm_run, first_stage_run, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: does not exist"):
        loading.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a run directory"):
        loading.load(tmp_path)
    with pytest.raises(ValueError, match=r"has no step 5; it has \[4, 8, 12, 16, 20, 24\]"):
        loading.load(ldm_run, step=5)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (("frozen",), "frozen/ or latents.json is missing: copy the whole run"),
        (("latents.json",), "frozen/ or latents.json is missing: copy the whole run"),
        (("checkpoints", "snapshots"), "holds no snapshot or checkpoint yet: train it first"),
    ],
)
def test_an_incomplete_run_is_an_error(ldm_run, tmp_path, missing, message):
    run = tmp_path / "run"
    shutil.copytree(ldm_run, run)
    for name in missing:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        loading.load(run)


def test_damaged_weights_are_an_error(ldm_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(ldm_run, run)
    data = max((run / "snapshots/24/params").rglob("d/*"), key=lambda f: f.stat().st_size)
    content = np.fromfile(data, np.uint8)
    content[len(content) // 2] ^= 1
    content.tofile(data)
    with pytest.raises(ValueError, match="snapshots/24: cannot be read"):
        loading.load(run)


def edited(source, run, file, before, after):
    """A copy of a run, in one of whose files a text was replaced."""
    shutil.copytree(source, run)
    text = (run / file).read_text()
    assert text.count(before) == 1
    (run / file).write_text(text.replace(before, after))
    return run


UNET = '"model_channels": 32'
OTHER = r"is of another model, \d+ arrays differ "


@pytest.mark.parametrize(
    ("step", "before", "after", "message"),
    [
        (24, UNET, '"model_channels": 64', r"snapshots/24/params: " + OTHER),
        (4, UNET, '"model_channels": 64', r"checkpoints/4/params: " + OTHER),
        (24, '"embed_dim": 32', '"embed_dim": 31', r"snapshots/24/params: " + OTHER),
        (24, UNET, '"model_channels": 33554432', "config.json: unet.model_channels is 33554432"),
        (24, '"num_heads": 2', '"num_heads": 3', "config.json: 3 heads at level 0, which do not"),
        (24, '"context_dim": 32', '"context_dim": null', "config.json: unet.context_dim is None"),
        (24, '"timesteps": 1000', '"timesteps": 0', "config.json: timesteps=0"),
    ],
)
def test_a_config_that_does_not_fit_its_weights(ldm_run, tmp_path, step, before, after, message):
    run = edited(ldm_run, tmp_path / "run", "config.json", before, after)
    with pytest.raises(ValueError, match=f"^{run}/{message}.*[:;] bring back the config.json"):
        loading.load(run, step=step)


@pytest.mark.parametrize("place", ["frozen/first_stage", "snapshots/24"])
def test_claims_of_a_run_are_compared_with_its_config(ldm_run, tmp_path, place):
    """Before its weights take memory: the files of this array could be of any size."""
    run = tmp_path / "run"
    shutil.copytree(ldm_run, run)
    name = "unet.conv_in.kernel" if place.startswith("snap") else "encoder.conv_in.kernel"
    claim(run / place / "params", name, [3, 3, 4, 64])
    with pytest.raises(ValueError, match=f"^{run}/{place}/params: is of another model, 1 arrays"):
        loading.load(run)
