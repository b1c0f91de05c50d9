"""Bare single files: every option that names and shapes show comes back, the rest is a guess."""

import dataclasses

import jax
import numpy as np
import pytest
from families import FAMILIES, V
from reference import released

from ldm_jax import bundle
from ldm_jax.convert import compvis, table
from ldm_jax.convert.compvis import single_file, yaml_options


def tensors_of(config):
    """{CompVis name: shape} of a model."""
    built = bundle.build(config, {}, 1.0)
    return table.to_torch(compvis.model_rows(built), compvis.model_shapes(built))


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: x for n, x in t.items() if not n.startswith("first")}, "no tensors named"),
        (
            lambda t: {n.replace("text_model", "x"): x for n, x in t.items()},
            "no known text encoder",
        ),
        (
            lambda t: (
                t | {"model.diffusion_model.input_blocks.0.0.weight": np.zeros((64, 6, 3, 3))}
            ),
            "takes 2 channels beside the latent: no known model",
        ),
    ],
)
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
