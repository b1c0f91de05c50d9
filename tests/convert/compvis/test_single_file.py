"""Bare single files: every option that names and shapes show comes back, the rest is a guess."""

import dataclasses

import jax
import numpy as np
import pytest
from families import FAMILIES, OPEN_CLIP, OPEN_TEXT, V
from reference import released

from ldm_jax import bundle, conditioning, schema
from ldm_jax.convert import compvis, table
from ldm_jax.convert.compvis import model_yaml, single_file, yaml_options


def tensors_of(config):
    """{CompVis name: shape} of a model."""
    built = bundle.build(config, {}, 1.0)
    return table.to_torch(compvis.model_entries(built), compvis.model_shapes(built))


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_tell_the_model(family):
    config = FAMILIES[family]
    bundle.check(config)
    found = single_file.recognize(tensors_of(config))
    assert found.family == family
    assert found.config == config
    assert found.scale == (0.08333 if "upscaler" in family else 0.18215)
    assert f"it was trained on images of {config.size} pixels" in found.guesses
    assert any("predicts v" in guess for guess in found.guesses) == (family == "Stable Diffusion 2")


def test_the_variant_overrides_the_guess():
    tensors = tensors_of(FAMILIES["Stable Diffusion 2"])
    base = single_file.recognize(tensors, "v2")
    assert (base.config.diffusion.prediction, base.config.size) == ("eps", 128)
    assert not any("predicts" in guess for guess in base.guesses)
    assert single_file.recognize(tensors, "v2-v").config.diffusion == V
    with pytest.raises(ValueError, match="variant='v3' is not one of v2, v2-v"):
        single_file.recognize(tensors, "v3")


# --- OpenCLIP with its last block, which nothing reads, and without ------------------------------


def with_encoder(num_layers, layer):
    """(Stable Diffusion 2 with another text encoder, that encoder)."""
    encoder = dataclasses.replace(OPEN_CLIP, num_layers=num_layers, layer=layer)
    text = dataclasses.replace(OPEN_TEXT, encoder=encoder)
    return dataclasses.replace(FAMILIES["Stable Diffusion 2"], cond=text), encoder


@pytest.mark.parametrize(("blocks", "layer"), [(24, "penultimate"), (23, "last"), (1, "last")])
def test_the_blocks_of_the_file_decide_the_layer(blocks, layer):
    """24 as Stability's files, 23 as diffusers' converters and ours write them."""
    config, _ = with_encoder(blocks, layer)
    tensors = tensors_of(config)
    found = single_file.recognize(tensors)
    assert found.config == config
    assert f"its text is what the {layer} of the text encoder's {blocks} blocks gives" in (
        found.guesses
    )
    stage = {n: x for n, x in tensors.items() if n.startswith(single_file.COND_STAGE)}
    options = {"freeze": True, "layer": "penultimate"}  # as every YAML of Stability says
    model, _ = compvis.load_cond_stage("modules.FrozenOpenCLIPEmbedder", options, stage)
    assert (model.num_layers, model.layer) == (blocks, layer)


@pytest.mark.parametrize(("blocks", "layer"), [(3, "penultimate"), (3, "last")])
def test_the_yaml_is_right_where_the_encoder_has_all_blocks(blocks, layer):
    """In Stability's code too: it makes OpenCLIP's blocks, the file fills in those that it has."""
    config, _ = with_encoder(blocks, layer)
    model = conditioning.build(config.cond)
    params = conditioning.init(config.cond, model, jax.random.key(0))
    ids = np.arange(14).reshape(2, 7)
    wanted = jax.jit(model.apply)({"params": params}, ids)

    written = compvis.as_written(bundle.build(config, {"cond_stage": params}, 1.0))
    text = model_yaml.model_options(written.config, 1.0)["params"]["cond_stage_config"]
    tensors = compvis.cond_stage_state_dict(written.config.cond, written.params["cond_stage"])
    count = written.config.cond.encoder.num_layers
    whole, encoder = with_encoder(count + count % 2, text["params"]["layer"])
    own = conditioning.init(whole.cond, conditioning.build(whole.cond), jax.random.key(1))
    filled = {**compvis.cond_stage_state_dict(whole.cond, own), **tensors}
    there, theirs = compvis.load_cond_stage(text["target"], text["params"], filled)
    assert (there.num_layers, there.layer) == (encoder.num_layers, encoder.layer)
    found = jax.jit(there.apply)({"params": theirs}, ids)
    np.testing.assert_array_equal(found, wanted)


def test_a_yaml_of_ours_from_before_counts_in_the_blocks_of_its_file():
    config, _ = with_encoder(23, "last")
    config = dataclasses.replace(config, diffusion=schema.DiffusionConfig(min_snr_gamma=5.0))
    values = {
        "model": model_yaml.model_options(config, 1.0),
        "ldm_jax": {"format": 1, "config": model_yaml.serialize.to_dict(config)},
    }
    encoder = values["model"]["params"]["cond_stage_config"]["params"]
    assert encoder["layer"] == "penultimate"
    assert model_yaml.config_of(values)[0] == config
    encoder["layer"] = "last"
    assert model_yaml.config_of(values)[0] == config


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_comes_back_from_the_bare_file(family, tmp_path):
    config, path = FAMILIES[family], tmp_path / "model.safetensors"
    model = bundle.build(config, {}, 0.08333 if "upscaler" in family else 0.18215)
    numbers = iter(range(10**6))
    fill = lambda x: np.full(x.shape, next(numbers), np.float32)  # noqa: E731
    params = jax.tree.map(fill, compvis.model_shapes(model))
    compvis.save(dataclasses.replace(model, params=params), path)
    (tmp_path / "model.yaml").unlink()
    again = compvis.load(path)
    assert (again.config, again.latent_scale) == (config, model.latent_scale)
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: x for n, x in t.items() if not n.startswith("first")}, "no tensors named"),
        (lambda t: {n.replace("text_model", "x"): x for n, x in t.items()},
         "no known text encoder"),
        (lambda t: (t | {"model.diffusion_model.input_blocks.0.0.weight": np.zeros((64, 6, 3, 3))}),
         "takes 2 channels beside the latent: no known model"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(change, message):
    tensors = change(tensors_of(FAMILIES["Stable Diffusion 1"]))
    with pytest.raises(ValueError, match=message):
        single_file.recognize(tensors)


@pytest.mark.parametrize("name", released())
def test_published_first_stages_by_shape(name):
    model, tensors = released()[name]
    options = model["params"]
    if "first_stage_config" in options:
        options = options["first_stage_config"]["params"]
        tensors = {
            n.removeprefix(single_file.FIRST_STAGE): x
            for n, x in tensors.items()
            if n.startswith(single_file.FIRST_STAGE)
        }
    shapes = {n: x.shape for n, x in tensors.items()}
    found = single_file.first_stage_config(shapes)
    wanted = yaml_options.first_stage_config(options)
    levels = tuple(sorted(wanted.attention_downsample))
    assert found == dataclasses.replace(wanted, attention_downsample=levels)


@pytest.mark.parametrize(
    "name", [name for name, (m, _) in released().items() if "txt" in name or "stable" in name]
)
def test_published_unets_by_shape(name):
    model, tensors = released()[name]
    prefix = single_file.UNET
    shapes = {n.removeprefix(prefix): x.shape for n, x in tensors.items() if n.startswith(prefix)}
    found = single_file.unet_config(shapes, num_heads=8)
    assert found == yaml_options.unet_config(model["params"]["unet_config"]["params"])


def test_shapes_of_arrays_and_structs_tell_the_same():
    tensors = tensors_of(FAMILIES["Stable Diffusion 1"])
    arrays = {n: np.broadcast_to(np.float32(0), x.shape) for n, x in tensors.items()}
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in tensors.values())
    assert single_file.recognize(arrays) == single_file.recognize(tensors)
