"""Published checkpoints fit by name and shape, and YAML options mean what the reference means."""

import functools
import json

import jax
import numpy as np
import pytest
from reference import case, released

from ldm_jax import schema
from ldm_jax.convert import compvis
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
}

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [2, 1],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_heads": 8,
    "use_spatial_transformer": True,
    "context_dim": 16,
}
DDCONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [32],
    "dropout": 0.0,
}
FIRST_STAGE = {"embed_dim": 4, "monitor": "val/rec_loss", "lossconfig": {}, "ddconfig": DDCONFIG}


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
    """None for a vector-quantized one, too."""
    part = parts(name, "first_stage_config", compvis.FIRST_STAGE_PREFIX)
    return None if part is None or "n_embed" in part[0] else part


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
    assert len([name for name in released() if first_stage_part(name)]) == 13


@pytest.mark.parametrize("name", [name for name in released() if unet_part(name)])
def test_published_unet_fits_by_shape(name):
    config, tensors = unet_part(name)
    model, params = loaded(compvis.load_unet, config, tensors)
    if name in UNETS:  # every distinct one is
        assert (len(tensors), millions(params)) == UNETS[name]
        assert params == expected(unet, model)
        back = compvis.unet_state_dict(model, params)
        assert {compvis.UNET_PREFIX + key: x for key, x in back.items()} == tensors
    assert millions(params) in {count for _, count in UNETS.values()}


@pytest.mark.parametrize("name", [name for name in released() if first_stage_part(name)])
def test_published_first_stage_fits_by_shape(name):
    config, tensors = first_stage_part(name)
    model, params = loaded(compvis.load_first_stage, config, tensors)
    if name in FIRST_STAGES:
        assert (len(tensors), millions(params)) == FIRST_STAGES[name]
        assert params == expected(autoencoder, model)
        assert compvis.first_stage_state_dict(model, params) == tensors
    assert millions(params) in {count for _, count in FIRST_STAGES.values()}


@pytest.mark.parametrize("name", ["unet_churches", "unet_cin"])
def test_unet_goes_back_to_the_same_values(name):
    about, state_dict, _ = case(name)
    model, params = compvis.load_unet(about["config"], state_dict)
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(params))
    back = compvis.unet_state_dict(model, params)
    assert back.keys() == state_dict.keys()
    for key, x in state_dict.items():
        np.testing.assert_array_equal(back[key], x)


def test_first_stage_goes_back_to_the_same_values():
    about, state_dict, _ = case("ae_kl_f8_attn")
    config = {"ddconfig": about["ddconfig"], "embed_dim": about["embed_dim"]}
    back = compvis.first_stage_state_dict(*compvis.load_first_stage(config, state_dict))
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


def test_unet_options():
    got = compvis.unet_config(UNET | {"legacy": False, "use_checkpoint": True, "dropout": 0.1})
    assert got == schema.UNetConfig(
        in_channels=4,
        out_channels=4,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_downsample=(2, 1),
        num_heads=8,
        context_dim=16,
        dropout=0.1,
    )


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"num_head_channels": 16}, {"num_heads": None, "num_head_channels": 16}),
        ({"use_linear_in_transformer": True}, {"linear_projection": True}),
        ({"use_scale_shift_norm": True}, {"scale_shift_norm": True}),
        ({"resblock_updown": True}, {"resblock_updown": True}),
        ({"num_classes": 10}, {"num_classes": 10, "vector_dim": None}),
        (
            {"num_classes": "sequential", "adm_in_channels": 7},
            {"num_classes": None, "vector_dim": 7},
        ),
        ({"num_res_blocks": [2, 2], "context_dim": [9]}, {"num_res_blocks": 2, "context_dim": 9}),
        ({"use_spatial_transformer": False}, {"spatial_transformer": False}),
    ],
)
def test_unet_option_becomes_field(options, fields):
    got = compvis.unet_config(UNET | options)
    assert {name: getattr(got, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_new_attention_order": True}, "not supported: use_new_attention_order=True"),
        ({"disable_self_attentions": [True]}, "not supported: disable_self_attentions"),
        ({"n_embed": 512}, "not supported: n_embed=512"),
        ({"hint_channels": 3}, "unknown: hint_channels"),
        ({"num_classes": "continuous"}, "num_classes='continuous' is not supported"),
        ({"num_classes": "sequential"}, "num_classes='sequential' needs adm_in_channels"),
        ({"adm_in_channels": 7}, "adm_in_channels=7 needs num_classes='sequential'"),
        ({"num_res_blocks": [1, 2]}, r"\[1, 2\]: one value"),
    ],
)
def test_unet_options_that_cannot_be_kept_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compvis.unet_config(UNET | options)


def test_neither_heads_nor_their_width_is_an_error():
    without = {key: value for key, value in UNET.items() if key != "num_heads"}
    with pytest.raises(ValueError, match="num_heads=None and num_head_channels=None: give one"):
        compvis.load_unet(without, {})


def test_missing_options_are_named():
    with pytest.raises(ValueError, match="unet_config: missing: out_channels"):
        compvis.unet_config({k: v for k, v in UNET.items() if k != "out_channels"})


def test_first_stage_options():
    assert compvis.first_stage_config(FIRST_STAGE) == schema.AutoencoderKLConfig(
        channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_downsample=(2,)
    )
    none = FIRST_STAGE | {"ddconfig": DDCONFIG | {"attn_type": "none", "attn_resolutions": []}}
    got = compvis.first_stage_config(none)
    assert (got.mid_attention, got.attention_downsample) == (False, ())


@pytest.mark.parametrize(
    ("options", "inner", "message"),
    [
        ({"n_embed": 8192}, {}, "n_embed=8192 is a vector-quantized first stage"),
        ({"surprise": 1}, {}, "first_stage_config: unknown: surprise"),
        ({}, {"surprise": 1}, "ddconfig: unknown: surprise"),
        ({}, {"attn_type": "linear"}, "attn_type='linear' is not supported"),
        ({}, {"double_z": False}, "ddconfig: not supported: double_z=False"),
        ({}, {"tanh_out": True}, "ddconfig: not supported: tanh_out=True"),
    ],
)
def test_first_stage_options_that_cannot_be_kept_are_refused(options, inner, message):
    with pytest.raises(ValueError, match=message):
        compvis.first_stage_config(FIRST_STAGE | options | {"ddconfig": DDCONFIG | inner})


def test_stable_diffusion_2_layout_and_vector_labels():
    options = {"use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 7}
    model = unet.from_config(compvis.unet_config(UNET | options))
    tensors = compvis.unet_state_dict(model, expected(unet, model))
    assert tensors["label_emb.0.0.weight"].shape == (128, 7)
    assert tensors["label_emb.0.2.bias"].shape == (128,)
    assert tensors["input_blocks.1.1.proj_in.weight"].shape == (32, 32)
    assert tensors["output_blocks.1.2.conv.weight"].shape == (64, 64, 3, 3)
    again, params = compvis.load_unet(UNET | options, tensors)
    assert again == model
    assert params == expected(unet, model)
