"""The frozen first stage of a run: of every kind, kept with its scale."""

import dataclasses

import jax
import numpy as np
import pytest
import recipes

from ldm_jax import loading, schema, train_state
from ldm_jax.configs import tiny
from ldm_jax.models import autoencoder
from ldm_jax.runtime import rundir
from ldm_jax.train import frozen as frozen_parts
from ldm_jax.train import ldm

VQ = schema.AutoencoderVQConfig(
    channels=32, channel_mult=(1, 1), num_res_blocks=0, embed_dim=4, z_channels=4, num_codes=8
)


def vq():
    """(parameters, config), as `loading.load_first_stage` gives them."""
    module = autoencoder.from_config(VQ)
    image = np.zeros((1, 4, 4, 3), np.float32)
    return recipes.filled(jax.eval_shape(module.init, jax.random.key(0), image)["params"]), VQ


def config_of(path, channels):
    """tiny:class on latents of so many channels."""
    config = tiny.get_config("class")
    unet = dataclasses.replace(config.unet, in_channels=channels, out_channels=channels)
    place = schema.FirstStageConfig(path=path, scale_images=16)
    return dataclasses.replace(config, unet=unet, first_stage=place)


@pytest.mark.parametrize(("path", "channels", "side"), [("vq", 4, 8), ("identity", 3, 16)])
def test_a_stage_without_a_posterior_is_kept_and_trained_on(
    tmp_path, monkeypatch, path, channels, side
):
    monkeypatch.setattr(loading, "load_first_stage", lambda path: vq())
    config, mesh = config_of(path, channels), recipes.mesh_of(data=4)
    stream = recipes.stream_of(config)
    found = frozen_parts.find(config, tmp_path / "run")
    ldm.check(config, found.first_stage, stream, mesh)
    run, _ = rundir.open_run(tmp_path / "run", config)
    frozen = frozen_parts.prepare(config, run, mesh, stream, found)

    monkeypatch.setattr(loading, "load_first_stage", None)  # from now on the run has its own
    config = config_of("", channels)
    run = run.rename(tmp_path / "moved")
    again = frozen_parts.prepare(config, run, mesh, None)
    recipes.assert_same_bits(again.params, {} if path == "identity" else vq()[0])
    assert (again.config, again.scale) == (frozen.config, frozen.scale)

    images = np.stack([stream[i]["image"] for i in range(16)])
    if path == "vq":
        images = again.module.apply({"params": again.params}, images, method="encode")
    assert images.shape == (16, side, side, channels)
    assert frozen.scale == pytest.approx(1 / float(np.std(images)), rel=1e-4)

    def loss(params, batch, key):
        keys = train_state.step_keys(key, 0, ldm.DRAWS)
        keys = {name: train_state.example_keys(k, 8) for name, k in keys.items()}
        rows = {"batch": batch, "keys": keys}
        return ldm.make_loss(config, again, mesh)(again.arguments, params, rows, True)[0]

    shapes, _ = ldm.abstract_state(config, mesh)
    batch = recipes.batch_of(config, mesh, 0)
    assert jax.eval_shape(loss, shapes.params, batch, jax.random.key(0)).shape == ()


def test_another_stage_is_refused_in_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_first_stage", lambda path: vq())
    config, mesh = config_of("vq", 4), recipes.mesh_of(data=4)
    run, _ = rundir.open_run(tmp_path / "run", config)
    stream = recipes.stream_of(config)
    frozen_parts.prepare(config, run, mesh, stream)
    with pytest.raises(ValueError, match=r"--first-stage\.path identity: is not the first stage"):
        frozen_parts.find(config_of("identity", 4), run)
    frozen_parts.find(config_of("elsewhere", 4), run)  # the same weights
