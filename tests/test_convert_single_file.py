"""Bare single files: every option that names and shapes show comes back, the rest is a guess."""

import dataclasses

import jax
import numpy as np
import pytest
from reference import released

from ldm_jax import bundle, schema
from ldm_jax.convert import compvis, compvis_config, single_file, table

FIRST_STAGE = schema.AutoencoderKLConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1)
UNET = schema.UNetConfig(
    model_channels=64,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    attention_downsample=(2, 1),
    context_dim=64,
)
SECOND = dataclasses.replace(
    UNET, num_heads=None, num_head_channels=64, linear_projection=True, upcast_attention=True
)
CLIP = schema.CLIPTextConfig(50, 7, 64, 2, 1, 128)
OPEN_CLIP = dataclasses.replace(CLIP, activation="gelu", layer="penultimate")
TEXT = schema.TextCondConfig(CLIP, trainable=False)
OPEN_TEXT = schema.TextCondConfig(OPEN_CLIP, trainable=False)
BERT = schema.TextCondConfig(schema.BERTTextConfig(50, 7, 64, 2))
INPAINT = schema.InpaintCondConfig("mask_image", (0.0, 1.0), 0.0)
EPS = schema.DiffusionConfig()
V = schema.DiffusionConfig(prediction="v")


def model(unet, cond, diffusion=EPS, size=128, first_stage=FIRST_STAGE, **options):
    unet = dataclasses.replace(unet, **options)
    return schema.LatentDiffusionConfig(first_stage, unet, cond, diffusion, size)


F4 = dataclasses.replace(FIRST_STAGE, channel_mult=(1, 2, 2))
UPSCALER = model(
    SECOND,
    schema.HybridCondConfig(OPEN_TEXT, schema.UpscaleCondConfig()),
    schema.DiffusionConfig(beta_start=1e-4, beta_end=0.02, prediction="v"),
    size=512,
    first_stage=F4,
    in_channels=7,
    num_classes=1000,
    num_heads=8,
    num_head_channels=None,
    attention_downsample=(4, 2),
    channel_mult=(1, 2, 4),
    context_dim=64,
    only_cross_attention=(True, True, False),
)
FAMILIES = {
    "Stable Diffusion 1": model(UNET, TEXT),
    "Stable Diffusion 1 inpainting": model(
        UNET, schema.HybridCondConfig(TEXT, INPAINT), in_channels=9
    ),
    "Stable Diffusion 2": model(SECOND, OPEN_TEXT, V, size=192),
    "Stable Diffusion 2 inpainting": model(
        SECOND, schema.HybridCondConfig(OPEN_TEXT, INPAINT), in_channels=9
    ),
    "Stable Diffusion 2 depth": model(
        SECOND, schema.HybridCondConfig(OPEN_TEXT, schema.DepthCondConfig()), in_channels=5
    ),
    "Stable Diffusion 2 upscaler": UPSCALER,
    "latent diffusion text2img": model(UNET, BERT, size=64, transformer_depth=2),
}


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
    wanted = compvis_config.first_stage_config(options)
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
    assert found == compvis_config.unet_config(model["params"]["unet_config"]["params"])


def test_shapes_of_arrays_and_structs_tell_the_same():
    tensors = tensors_of(FAMILIES["Stable Diffusion 1"])
    arrays = {n: np.broadcast_to(np.float32(0), x.shape) for n, x in tensors.items()}
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in tensors.values())
    assert single_file.recognize(arrays) == single_file.recognize(tensors)
