"""A first stage alone, in every form that has one, goes wherever a first stage is asked for."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import recipes
import reference
from flax import serialization

import ldm_jax
from ldm_jax import bundle, loading, saving, schema, sharding
from ldm_jax.convert import compvis
from ldm_jax.convert.formats import safetensors_file
from ldm_jax.models import autoencoder
from ldm_jax.runtime import cli
from ldm_jax.sample import convert
from ldm_jax.sample.evaluate import reconstruct
from ldm_jax.train.frozen import first_stage

KL = schema.AutoencoderKLConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1)
VQ = schema.AutoencoderVQConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1, num_codes=8)
FORMS = ("run", "folder", "msgpack", "file", "ckpt", "bare")


def made(config, scale=0.5):
    module = autoencoder.from_config(config)
    inputs = autoencoder.example_inputs(module)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return bundle.first_stage_alone(config, reference.filled({"x": shapes})["x"], scale, 16)


def written(model, form, folder):
    """Path of the model in one of FORMS."""
    to = {"run": "ldm_jax", "folder": "diffusers", "msgpack": "diffusers"}.get(form, "compvis")
    name = {"compvis": f"{form}.ckpt" if form == "ckpt" else f"{form}.safetensors"}.get(to, form)
    saving.save(model, folder / name, to=to)
    if form == "bare":
        (folder / name).with_suffix(".yaml").unlink()
    if form == "msgpack":  # as the Flax classes of diffusers wrote it
        (folder / name / "diffusion_pytorch_model.safetensors").unlink()
        content = serialization.msgpack_serialize(jax.device_get(model.params["first_stage"]))
        (folder / name / "diffusion_flax_model.msgpack").write_bytes(content)
        options = json.loads((folder / name / "config.json").read_text())
        options["_class_name"] = f"Flax{options['_class_name']}"
        (folder / name / "config.json").write_text(json.dumps(options))
    return folder / name


@pytest.mark.parametrize(
    ("config", "form"), [(KL, form) for form in FORMS] + [(VQ, "msgpack"), (VQ, "bare")]
)
def test_every_form_loads_wherever_a_first_stage_is_asked_for(config, form, tmp_path):
    model = made(config)
    path = written(model, form, tmp_path)
    alone = ldm_jax.load(path)
    assert alone.unet is None
    assert alone.config.first_stage == config
    assert alone.latent_scale == 0.5
    recipes.assert_same_bits(alone.params, model.params)
    params, found = loading.load_first_stage(path)
    assert found == config
    recipes.assert_same_bits(params, model.params["first_stage"])
    training = recipes.ldm_config("unconditional")
    training = dataclasses.replace(
        training, first_stage=dataclasses.replace(training.first_stage, path=str(path))
    )
    params, found = first_stage.find(training, tmp_path / "new")
    assert found == config
    options = reconstruct.Options(model=str(path), out=str(tmp_path / "out"))
    stage = reconstruct.open_stage(options, sharding.make_mesh(schema.MeshConfig()))
    recipes.assert_same_bits(stage.params, model.params["first_stage"])


@pytest.mark.parametrize(
    ("form", "to"),
    [("msgpack", "ldm_jax"), ("run", "diffusers"), ("ckpt", "diffusers"), ("folder", "compvis")],
)
def test_every_form_converts_to_every_format(form, to, tmp_path, capsys):
    model = made(VQ)
    source = written(model, form, tmp_path)
    target = tmp_path / ("new.safetensors" if to == "compvis" else "new")
    flags = [str(source), str(target), "--to", to]
    for more in ((), ("--check",), ("--overwrite",)):
        code = cli.run("ldm-convert", convert.convert, [*flags, *more])
        assert code == 0, capsys.readouterr().err
    again = ldm_jax.load(target)
    recipes.assert_same_bits(again.params, model.params)
    assert (again.config.first_stage, again.latent_scale) == (VQ, 0.5)


def test_a_run_that_trained_converts(first_stage_run, tmp_path):
    """It has no latent scale, which a diffusion model's run measures."""
    model = ldm_jax.load(first_stage_run)
    params, config = loading.load_first_stage(first_stage_run)
    recipes.assert_same_bits(model.params["first_stage"], params)
    assert (model.config.first_stage, model.latent_scale) == (config, 1.0)
    for to, name in (("diffusers", "folder"), ("compvis", "x.safetensors"), ("ldm_jax", "run")):
        saving.save(model, tmp_path / name, to=to)
        recipes.assert_same_bits(ldm_jax.load(tmp_path / name).params, model.params)


@pytest.mark.torch
@pytest.mark.parametrize(("config", "name"), [(KL, "AutoencoderKL"), (VQ, "VQModel")])
def test_diffusers_loads_what_we_write(config, name, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference here")
    import torch

    model = made(config)
    saving.save(model, tmp_path / "vae", to="diffusers")
    theirs = getattr(diffusers, name).from_pretrained(tmp_path / "vae").eval()
    assert theirs.config.scaling_factor == 0.5
    z = np.random.default_rng(0).standard_normal((1, 4, 4, config.embed_dim)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.decode(torch.from_numpy(z.transpose(0, 3, 1, 2))).sample.numpy()
    ours = model.decode(z * 0.5)
    np.testing.assert_allclose(ours, expected.transpose(0, 2, 3, 1), atol=1e-4)


def test_a_published_file_of_a_first_stage(tmp_path):
    """As `vae-ft-mse-840000-ema-pruned`: no prefix, losses and average beside it."""
    model = made(KL)
    state = compvis.first_stage_state_dict(model.first_stage, model.params["first_stage"])
    state |= {"loss.logvar": np.float32(0), "model_ema.decay": np.float32(0.9)}
    safetensors_file.write(tmp_path / "vae.safetensors", state)
    alone = ldm_jax.load(tmp_path / "vae.safetensors")
    recipes.assert_same_bits(alone.params, model.params)
    shapes = ldm_jax.load(tmp_path / "vae.safetensors", shapes_only=True).params
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(shapes))
    prefixed = {f"first_stage_model.{name}": x for name, x in state.items()}
    safetensors_file.write(tmp_path / "prefixed.safetensors", prefixed)
    recipes.assert_same_bits(ldm_jax.load(tmp_path / "prefixed.safetensors").params, model.params)
