"""YAML options of the reference mean here what they mean there, and go back."""

import dataclasses

import pytest
from compvis_options import SD2, UNET, UPSCALER
from reference import case, released

from ldm_jax import schema
from ldm_jax.convert.compvis.yaml_options import (
    DDCONFIG_DEFAULTS,
    FIRST_STAGE_IGNORED,
    UNET_DEFAULTS,
    UNET_IGNORED,
    first_stage_config,
    first_stage_options,
    first_stage_target,
    unet_config,
    unet_options,
)

DDCONFIG = {
    **{
        "double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3,
        "ch": 32,
    },
    **{"ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [32], "dropout": 0.0},
}  # fmt: skip
FIRST_STAGE = {"embed_dim": 4, "monitor": "val/rec_loss", "lossconfig": {}, "ddconfig": DDCONFIG}
QUANTIZED = {"embed_dim": 3, "n_embed": 64, "ddconfig": DDCONFIG | {"double_z": False}}


def sections(key):
    """(options, `target`) of one part of every published model that has it."""
    for name in sorted(released()):
        model = released()[name][0]
        if key in model["params"]:
            yield model["params"][key]["params"], model["params"][key]["target"]
        elif key == "first_stage_config":
            yield model["params"], model["target"]


def plain(options, defaults, ignored=()):
    """Options that matter: neither ignored nor at their default."""
    return {
        name: x
        for name, x in options.items()
        if name not in ignored and (name not in defaults or x != defaults[name])
    }


def test_published_unets_go_back_to_their_options():
    found = list(sections("unet_config"))
    assert len(found) == 20
    for options, _ in [*found, (SD2, ""), (UPSCALER, "")]:
        config = unet_config(options)
        back = unet_options(config, options["image_size"])
        fixed = {"disable_middle_self_attn": False}
        assert plain(back, {}, UNET_IGNORED) == plain(options, UNET_DEFAULTS | fixed, UNET_IGNORED)
        assert back["image_size"] == options["image_size"]
        assert unet_config(back) == config


def test_published_first_stages_go_back_to_their_options():
    found = list(sections("first_stage_config"))
    assert len(found) == 33
    for options, target in found:
        config = first_stage_config(options)
        back = first_stage_options(config)
        assert plain(back.pop("ddconfig"), DDCONFIG_DEFAULTS) == plain(
            options["ddconfig"], DDCONFIG_DEFAULTS
        )
        assert plain(back, {}, FIRST_STAGE_IGNORED) == plain(
            options, {}, (*FIRST_STAGE_IGNORED, "ddconfig")
        )
        assert first_stage_config(first_stage_options(config)) == config
        # a first stage alone is a VQModel, with the same options
        assert first_stage_target(config) == target.replace("VQModel", "VQModelInterface").replace(
            "InterfaceInterface", "Interface"
        )


def test_options_of_golden_models_are_kept():
    about, _, _ = case("ae_vq_f4")
    options = {name: about[name] for name in ("ddconfig", "embed_dim", "n_embed")}
    assert first_stage_config(options) == schema.AutoencoderVQConfig(
        channels=32, channel_mult=(1, 2, 2), num_res_blocks=1, num_codes=64
    )


def test_unet_options():
    got = unet_config(UNET | {"legacy": False, "use_checkpoint": True, "dropout": 0.1})
    assert got == schema.UNetConfig(
        in_channels=4, out_channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
        attention_downsample=(2, 1), num_heads=8, context_dim=16, dropout=0.1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"num_head_channels": 16}, {"num_heads": None, "num_head_channels": 16}),
        ({"use_linear_in_transformer": True}, {"linear_projection": True}),
        ({"use_scale_shift_norm": True}, {"scale_shift_norm": True}),
        ({"resblock_updown": True}, {"resblock_updown": True}),
        ({"num_classes": 10}, {"num_classes": 10, "vector_dim": None}),
        ({"num_classes": "sequential", "adm_in_channels": 7},
         {"num_classes": None, "vector_dim": 7}),
        ({"num_res_blocks": [2, 2], "context_dim": [9]}, {"num_res_blocks": 2, "context_dim": 9}),
        ({"use_spatial_transformer": False, "context_dim": None},
         {"spatial_transformer": False, "context_dim": None}),
        ({"disable_self_attentions": [True, False]}, {"only_cross_attention": (True, False)}),
        ({"disable_self_attentions": None}, {"only_cross_attention": ()}),
    ],
)  # fmt: skip
def test_unet_option_becomes_field_and_goes_back(options, fields):
    config = unet_config(UNET | options)
    assert {name: getattr(config, name) for name in fields} == fields
    assert unet_config(unet_options(config, 32)) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_new_attention_order": True}, "not supported: use_new_attention_order=True"),
        ({"disable_middle_self_attn": True}, "not supported: disable_middle_self_attn=True"),
        ({"num_attention_blocks": [1, 1]}, r"not supported: num_attention_blocks=\[1, 1\]"),
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
        unet_config(UNET | options)


def test_heads_per_level_are_written_as_their_width():
    by_width = unet_config(SD2)
    by_level = dataclasses.replace(by_width, num_heads=(5, 10, 20, 20), num_head_channels=None)
    assert unet_options(by_level, 32) == unet_options(by_width, 32)
    uneven = dataclasses.replace(by_level, num_heads=(5, 10, 10, 10))
    with pytest.raises(ValueError, match=r"\(5, 10, 10, 10\) .* these have \[64, 128\]"):
        unet_options(uneven, 32)


def test_missing_options_are_named():
    with pytest.raises(ValueError, match="unet_config: missing: out_channels"):
        unet_config({k: v for k, v in UNET.items() if k != "out_channels"})
    with pytest.raises(ValueError, match="first_stage_config: missing: ddconfig"):
        first_stage_config({"embed_dim": 4})


def test_first_stage_options():
    assert first_stage_config(FIRST_STAGE) == schema.AutoencoderKLConfig(
        channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_downsample=(2,)
    )
    none = FIRST_STAGE | {"ddconfig": DDCONFIG | {"attn_type": "none", "attn_resolutions": []}}
    got = first_stage_config(none)
    assert (got.mid_attention, got.attention_downsample) == (False, ())
    same = FIRST_STAGE | {"ddconfig": DDCONFIG | {"attn_type": "vanilla-xformers"}}
    assert first_stage_config(same) == first_stage_config(FIRST_STAGE)


def test_quantized_first_stage_options():
    trained = {"use_ema": True, "lr_g_factor": 2.0, "scheduler_config": {}, "remap": None}
    assert first_stage_config(QUANTIZED | trained) == schema.AutoencoderVQConfig(
        channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_downsample=(2,), z_channels=4,
        embed_dim=3, num_codes=64,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"vq_interface": True}])
def test_no_first_stage(options):
    config = first_stage_config(options, channels=1)
    assert config == schema.IdentityFirstStageConfig(1)
    assert first_stage_options(config) == {}
    assert first_stage_target(config).endswith("IdentityFirstStage")


@pytest.mark.parametrize(
    ("options", "inner", "message"),
    [
        ({"surprise": 1}, {}, "first_stage_config: unknown: surprise"),
        ({"remap": "used.npy"}, {}, "first_stage_config: unknown: remap"),
        ({"n_embed": 8, "remap": "used.npy"}, {}, "not supported: remap='used.npy'"),
        ({"n_embed": 8}, {"double_z": True}, "ddconfig: not supported: double_z=True"),
        ({}, {"surprise": 1}, "ddconfig: unknown: surprise"),
        ({}, {"attn_type": "linear"}, "attn_type='linear' is not supported"),
        ({}, {"double_z": False}, "ddconfig: not supported: double_z=False"),
        ({}, {"tanh_out": True}, "ddconfig: not supported: tanh_out=True"),
    ],
)
def test_first_stage_options_that_cannot_be_kept_are_refused(options, inner, message):
    with pytest.raises(ValueError, match=message):
        first_stage_config(FIRST_STAGE | options | {"ddconfig": DDCONFIG | inner})


def test_identity_has_no_other_options():
    with pytest.raises(ValueError, match="first_stage_config: unknown: surprise"):
        first_stage_config({"surprise": 1})


def test_attention_at_levels_alone_cannot_be_written():
    config = schema.AutoencoderKLConfig(attention_downsample=(8,), mid_attention=False)
    with pytest.raises(ValueError, match=r"attention_downsample=\(8,\) with mid_attention=False"):
        first_stage_options(config)
