"""Published checkpoints fit by name and shape, and go back."""

import functools
import json

import jax
import meshes
import numpy as np
import pytest
from compvis_options import UNET
from reference import case, released

from ldm_jax import conditioning
from ldm_jax.convert import compvis
from ldm_jax.convert.compvis import conditions
from ldm_jax.convert.compvis.yaml_options import unet_config
from ldm_jax.models import autoencoder, unet

# config: (tensors, millions of parameters), from the reference's own models
UNETS = {
    "sd__configs__stable-diffusion__v1-inference": (686, 859.52),
    "configs__latent-diffusion__txt2img-1p4B-eval": (686, 872.30),
    "configs__latent-diffusion__cin256-v2": (688, 400.92),
    "configs__retrieval-augmented-diffusion__768x768": (688, 1335.48),
    "ldm__bsr_sr": (306, 113.62),
    "ldm__celeba256": (368, 274.06),
    "ldm__cin256": (626, 394.98),
    "ldm__inpainting_big": (416, 387.25),
    "ldm__layout2img-openimages256": (1328, 246.28),
    "ldm__lsun_churches256": (520, 294.97),
    "ldm__semantic_synthesis256": (216, 215.23),
    "ldm__text2img256": (688, 403.62),
}
FIRST_STAGES = {
    "first_stage_kl-f4": (204, 55.31),
    "first_stage_kl-f8": (248, 83.65),
    "first_stage_kl-f16": (342, 69.61),
    "first_stage_kl-f32": (436, 103.88),
    "first_stage_vq-f4": (205, 55.32),
    "first_stage_vq-f4-noattn": (185, 53.22),
    "first_stage_vq-f8": (299, 67.72),
    "first_stage_vq-f8-n256": (299, 67.65),
    "first_stage_vq-f16": (343, 69.59),
}


def parts(name, section, prefix):
    """(config, tensors with their prefix) of one part of a published model; None if it has none."""
    about, tensors = released()[name]
    config = about["params"]
    if section in config:
        mine = {k: x for k, x in tensors.items() if k.startswith(prefix)}
        return config[section]["params"], mine
    return None if "unet_config" in config or section == "unet_config" else (config, tensors)


def unet_part(name):
    return parts(name, "unet_config", compvis.UNET_PREFIX)


def first_stage_part(name):
    return parts(name, "first_stage_config", compvis.FIRST_STAGE_PREFIX)


@functools.cache
def _load(load, config_json, tensors):
    return load(json.loads(config_json), dict(tensors))


def loaded(load, config, tensors):
    """What `load` gives for a published part; many are equal, and are then loaded once."""
    return _load(load, json.dumps(config, sort_keys=True), tuple(sorted(tensors.items())))


def millions(params):
    return round(sum(x.size for x in jax.tree.leaves(params)) / 1e6, 2)


def expected(models, model):
    """Shapes of the parameters that a module of `models` asks for."""
    return jax.eval_shape(model.init, jax.random.key(0), *models.example_inputs(model))["params"]


def test_published_parts_are_all_here():
    assert len([name for name in released() if unet_part(name)]) == 20
    assert len([name for name in released() if first_stage_part(name)]) == 33


@pytest.mark.parametrize("name", [name for name in released() if unet_part(name)])
def test_published_unet_fits_by_shape(name):
    config, tensors = unet_part(name)
    model, params = loaded(compvis.load_unet, config, tensors)
    if name in UNETS:  # every distinct one is
        assert (len(tensors), millions(params)) == UNETS[name]
        assert params == expected(unet, model)
        meshes.refuse_copies({"unet": params})
        back = compvis.unet_state_dict(model, params)
        assert {compvis.UNET_PREFIX + key: x for key, x in back.items()} == tensors
    assert millions(params) in {count for _, count in UNETS.values()}


@pytest.mark.parametrize("name", released())
def test_published_first_stage_fits_by_shape(name):
    config, tensors = first_stage_part(name)
    model, params = loaded(compvis.load_first_stage, config, tensors)
    if name in FIRST_STAGES:
        assert (len(tensors), millions(params)) == FIRST_STAGES[name]
        assert params == expected(autoencoder, model)
        meshes.refuse_copies({"first_stage": params})
        assert compvis.first_stage_state_dict(model, params) == tensors
    assert millions(params) in {count for _, count in FIRST_STAGES.values()}


COND_STAGES = {
    "configs__latent-diffusion__txt2img-1p4B-eval": (422, 581.99),
    "configs__latent-diffusion__cin256-v2": (1, 0.51),
    "ldm__cin256": (1, 0.51),
    "ldm__layout2img-openimages256": (214, 58.86),
    "ldm__semantic_synthesis256": (1, 0.0),
    "ldm__text2img256": (422, 186.15),
}


def cond_stage_part(name):
    """(target, params, tensors with their prefix)"""
    about, tensors = released()[name]
    stage = about["params"].get("cond_stage_config", "none")
    mine = {k: x for k, x in tensors.items() if k.startswith(compvis.COND_STAGE_PREFIX)}
    if isinstance(stage, str):
        return stage, {}, mine
    return stage["target"], stage.get("params", {}), mine


def load_cond_stage(config, tensors):
    return compvis.load_cond_stage(*config, tensors)


@pytest.mark.parametrize("name", [name for name in released() if cond_stage_part(name)[2]])
def test_published_cond_stage_fits_by_shape(name):
    target, config, tensors = cond_stage_part(name)
    model, params = loaded(load_cond_stage, (target, config), tensors)
    if name in COND_STAGES:
        assert (len(tensors), millions(params)) == COND_STAGES[name]
        cond = conditions.cond_stage_config(target.rpartition(".")[2], config, {})
        assert params == jax.eval_shape(
            lambda key: conditioning.init(cond, model, key), jax.random.key(0)
        )
        meshes.refuse_copies({"cond_stage": params})
        back = compvis.cond_stage_state_dict(cond, params)
        assert {compvis.COND_STAGE_PREFIX + key: x for key, x in back.items()} == tensors
    assert (len(tensors), millions(params)) in COND_STAGES.values()


@pytest.mark.parametrize("name", released())
def test_every_published_name_belongs_to_one_part(name):
    _, tensors = released()[name]
    parts = [unet_part(name), first_stage_part(name), cond_stage_part(name)]
    names = [key for part in parts if part for key in part[-1]]
    assert len(names) == len(tensors)
    assert set(names) == set(tensors)


@pytest.mark.parametrize("target", ["torch.nn.Identity", "__is_first_stage__"])
def test_stages_without_parameters(target):
    assert compvis.load_cond_stage(target, {}, {}) == (None, {})
    with pytest.raises(ValueError, match="unknown surprise"):
        compvis.load_cond_stage(target, {}, {"surprise": np.zeros(1)})


@pytest.mark.parametrize("name", ["unet_churches", "unet_cin", "ae_kl_f8_attn"])
def test_a_part_goes_back_to_the_same_values(name):
    about, state_dict, _ = case(name)
    if name.startswith("unet"):
        model, params = compvis.load_unet(about["config"], state_dict)
        back = compvis.unet_state_dict(model, params)
    else:
        config = {"ddconfig": about["ddconfig"], "embed_dim": about["embed_dim"]}
        model, params = compvis.load_first_stage(config, state_dict)
        back = compvis.first_stage_state_dict(model, params)
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(params))
    assert back.keys() == state_dict.keys()
    for key, x in state_dict.items():
        np.testing.assert_array_equal(back[key], x)


def test_the_prefix_is_on_all_names_or_on_none():
    about, state_dict, _ = case("unet_semantic")
    prefixed = {compvis.UNET_PREFIX + key: x for key, x in state_dict.items()}
    plain, with_prefix = (compvis.load_unet(about["config"], s)[1] for s in (state_dict, prefixed))
    assert jax.tree.all(jax.tree.map(np.array_equal, plain, with_prefix))
    mixed = state_dict | {compvis.UNET_PREFIX + "out.2.bias": state_dict["out.2.bias"]}
    with pytest.raises(ValueError, match=r"unknown model\.diffusion_model\.out\.2\.bias"):
        compvis.load_unet(about["config"], mixed)


def test_a_tensor_too_many_or_too_few_is_an_error():
    about, state_dict, _ = case("unet_semantic")
    state_dict["ema"] = state_dict.pop("out.0.bias")
    with pytest.raises(ValueError, match=r"missing out\.0\.bias; unknown ema"):
        compvis.load_unet(about["config"], state_dict)


def test_stable_diffusion_2_layout_and_vector_labels():
    options = {"use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 7}
    model = unet.from_config(unet_config(UNET | options))
    tensors = compvis.unet_state_dict(model, expected(unet, model))
    assert tensors["label_emb.0.0.weight"].shape == (128, 7)
    assert tensors["label_emb.0.2.bias"].shape == (128,)
    assert tensors["input_blocks.1.1.proj_in.weight"].shape == (32, 32)
    assert tensors["output_blocks.1.2.conv.weight"].shape == (64, 64, 3, 3)
    again, params = compvis.load_unet(UNET | options, tensors)
    assert again == model
    assert params == expected(unet, model)
