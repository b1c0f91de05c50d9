"""Finetuning: a run that starts from another first stage, and trains its decoder alone."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import recipes

from ldm_jax import loading, schema, sharding
from ldm_jax.configs import tiny
from ldm_jax.convert import auxiliary, compvis
from ldm_jax.convert.formats import safetensors_file
from ldm_jax.models import autoencoder as models
from ldm_jax.models import discriminator
from ldm_jax.runtime import checkpoint, cli
from ldm_jax.train import autoencoder, main
from ldm_jax.train.autoencoder import initial, reconstruction


def config_of(first_stage_run, **changes):
    """tiny:gan on the decoder of the tiny first stage."""
    return dataclasses.replace(
        tiny.get_config("gan"),
        init_from=str(first_stage_run),
        train_only="decoder",
        loss=schema.FirstStageLossConfig(disc_start=0),
        optimizer=dataclasses.replace(tiny.get_config("gan").optimizer, weight_decay=0.1),
        steps=4,
        **changes,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory, first_stage_run):
    path = tmp_path_factory.mktemp("decoder") / "run"
    assert autoencoder.train(config_of(first_stage_run), path) == 0
    return path


@pytest.mark.slow
def test_the_decoder_moves_and_the_latents_stay(run, first_stage_run):
    """With weight decay and an average, neither of which may touch what stays."""
    before, model = loading.load_first_stage(first_stage_run)
    parts = checkpoint.restore_parts(run, 4, ("params", "ema_params", "opt_state"))
    after, _ = loading.load_first_stage(run)
    for found in (parts["params"]["autoencoder"], parts["ema_params"]["autoencoder"], after):
        for name, tree in found.items():
            if name in reconstruction.DECODER:
                assert recipes.largest_difference(tree, before[name]) > 1e-4
            else:
                recipes.assert_same_bits(tree, before[name])
    recipes.assert_same_bits(after, parts["ema_params"]["autoencoder"])
    assert recipes.largest_difference(after["decoder"], parts["params"]["autoencoder"]["decoder"])
    image = np.stack([recipes.stream_of(config_of(run))[i]["image"] for i in range(2)])
    module = models.from_config(model)
    latents = [module.apply({"params": p}, image, method="encode") for p in (before, after)]
    recipes.assert_same_bits(*latents)
    moments = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(parts["opt_state"])
    ]
    assert any("'decoder'" in name for name in moments)
    assert not any("'encoder'" in name or "'quant_conv'" in name for name in moments)


@pytest.mark.slow
def test_it_resumes_without_what_it_started_from(run, first_stage_run, tmp_path):
    config = dataclasses.replace(config_of(first_stage_run), init_from="nowhere", steps=5)
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    assert autoencoder.train(config, moved) == 0
    assert checkpoint.latest_step(moved) == 5


@pytest.mark.slow
def test_all_of_it_trains_on_from_a_first_stage(first_stage_run, tmp_path):
    config = dataclasses.replace(
        tiny.get_config("first_stage"), init_from=str(first_stage_run), steps=1
    )
    assert autoencoder.train(config, tmp_path / "run") == 0
    before, _ = loading.load_first_stage(first_stage_run)
    after = checkpoint.restore_parts(tmp_path / "run", 1, ("params",))["params"]["autoencoder"]
    largest = recipes.largest_difference(after, before)
    assert 1e-4 < largest < 2e-3  # one step of Adam at a rate of 1e-3


# --- discriminators ------------------------------------------------------------------------------

GAN = recipes.gan_config()
GAN = dataclasses.replace(GAN, model=dataclasses.replace(GAN.model, num_res_blocks=1))


def published(path, params, disc=None):
    """A first stage's checkpoint as it is released, with the losses that it was trained with."""
    tensors = compvis.first_stage_state_dict(models.from_config(GAN.model), params["autoencoder"])
    if disc is not None:
        net = discriminator.from_config(GAN.discriminator)
        found = auxiliary.discriminator_state_dict(net, disc)
        tensors |= {f"loss.discriminator.main.{n}": x for n, x in found.items()}
    tensors = {n: np.ascontiguousarray(x) for n, x in tensors.items()}
    safetensors_file.write(path, {**tensors, "loss.logvar": np.zeros((), np.float32)}, {})
    return str(path)


@pytest.fixture(scope="module")
def new():
    """(a state with weights by formula, shapes, shardings) of `GAN` on two devices."""
    shapes, shardings = autoencoder.abstract_state(GAN, recipes.mesh_of(data=2))
    return sharding.place(recipes.filled(shapes), shardings), shapes, shardings


def variables(state):
    """Those of another discriminator, none of them that of the state."""
    found = {"params": state.disc_params, "batch_stats": state.disc_stats["batch_stats"]}
    return jax.tree.map(lambda x: 2 * np.asarray(x) + 1, jax.device_get(found))


def given_by(path, new, tmp_path, **changes):
    """(state that starts from `path`, what was found there)."""
    state, shapes, shardings = new
    config = dataclasses.replace(GAN, init_from=path, **changes)
    given = initial.find(config, tmp_path / "run", shapes)
    return initial.start(config, state, shardings, given), given


def test_a_released_discriminator_goes_on_too(new, tmp_path, capsys, shown):
    before = new[0]
    disc = variables(before)
    path = published(tmp_path / "model.safetensors", before.params, disc)
    state, _ = given_by(path, new, tmp_path)
    assert f"the discriminator starts from loss.discriminator of {path}" in capsys.readouterr().err
    recipes.assert_same_bits(state.disc_params, disc["params"])
    recipes.assert_same_bits(state.disc_stats["batch_stats"], disc["batch_stats"])
    assert set(state.disc_stats) == set(before.disc_stats)  # averages of LeCam stay
    recipes.assert_same_bits(state.params["autoencoder"], before.params["autoencoder"])


@pytest.mark.parametrize("layers", [0, 1])
def test_no_discriminator_or_another_is_told(new, tmp_path, capsys, shown, layers):
    """Of a file without one, and of one with other layers than the config has."""
    before = new[0]
    path = published(
        tmp_path / "model.safetensors", before.params, variables(before) if layers else None
    )
    if layers:
        other = dataclasses.replace(GAN.discriminator, layers=layers)
        config = dataclasses.replace(GAN, discriminator=other, init_from=path)
        shapes, _ = autoencoder.abstract_state(config, recipes.mesh_of(data=2))
        given = initial.find(config, tmp_path / "run", shapes)
        assert given.disc is None
        assert "norm_2" in given.said
    else:
        state, given = given_by(path, new, tmp_path)
        assert "starts anew" in capsys.readouterr().err
        assert "holds no discriminator" in given.said
        recipes.assert_same_bits(state.disc_params, before.disc_params)
    assert given.said.startswith("the discriminator starts anew: ")


@pytest.mark.slow
def test_the_discriminator_of_a_run_goes_on_too(run, tmp_path, capsys, shown):
    config = dataclasses.replace(
        tiny.get_config("gan"), init_from=str(run), steps=1, loss=schema.FirstStageLossConfig()
    )  # which does not train it before step 50 001
    assert autoencoder.train(config, tmp_path / "again") == 0
    assert f"the discriminator starts from that of {run} at step 4" in capsys.readouterr().err
    before, after = (
        checkpoint.restore_parts(path, None, ("disc_params",))["disc_params"]
        for path in (run, tmp_path / "again")
    )
    recipes.assert_same_bits(before, after)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--train-only decoder", "--train-only decoder: give --init-from"),
        ("--init-from /nowhere", "/nowhere: does not exist"),
        ("--init-from RUN --model.channels 64", "is another first stage (AutoencoderKLConfig("),
    ],
)
def test_what_cannot_be_started_from_is_refused(
    first_stage_run, tmp_path, capsys, flags, complaint
):
    flags = flags.replace("RUN", str(first_stage_run)).split()
    argv = ["tiny:gan", "--workdir", str(tmp_path / "run"), *flags]
    assert cli.run("ldm-train", main.train, argv) == 1
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
