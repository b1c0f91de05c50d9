"""Folders that the Flax pipelines of diffusers wrote, up to 0.39: every component in msgpack.

The names are written out here as those classes had them, not taken from our modules.
"""

import json

import ml_dtypes
import numpy as np
import pytest
import text_model
from flax import serialization, traverse_util
from reference import weight

from ldm_jax import loading
from ldm_jax.convert import diffusers

WIDTH, CONTEXT, WORDS = 32, 32, 600  # narrowest level, text encoder, rows of its table

UNET = {
    "_class_name": "FlaxUNet2DConditionModel", "_diffusers_version": "0.14.0.dev0",
    "sample_size": 8, "in_channels": 4, "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "block_out_channels": [WIDTH, 2 * WIDTH],
    "layers_per_block": 1, "attention_head_dim": 4, "cross_attention_dim": CONTEXT, "dropout": 0.0,
    "only_cross_attention": False, "use_linear_projection": False, "flip_sin_to_cos": True,
    "freq_shift": 0, "use_memory_efficient_attention": False,
}  # fmt: skip
VAE = {
    "_class_name": "FlaxAutoencoderKL", "in_channels": 3, "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [WIDTH, 2 * WIDTH], "layers_per_block": 1, "act_fn": "silu",
    "latent_channels": 4, "norm_num_groups": 32, "sample_size": 16,
}  # fmt: skip
TEXT = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": WORDS,
    "max_position_embeddings": 16, "hidden_size": CONTEXT, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05, "transformers_version": "4.24.0",
}  # fmt: skip
SCHEDULER = {
    "_class_name": "FlaxPNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}  # fmt: skip
INDEX = {
    "_class_name": "FlaxStableDiffusionPipeline",
    "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
    "safety_checker": ["stable_diffusion", "FlaxStableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "FlaxPNDMScheduler"],
    "text_encoder": ["transformers", "FlaxCLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "FlaxUNet2DConditionModel"],
    "vae": ["diffusers", "FlaxAutoencoderKL"],
}


def conv(name, i, o, size=3):
    return {f"{name}/kernel": (size, size, i, o), f"{name}/bias": (o,)}


def dense(name, i, o, bias=True):
    return {f"{name}/kernel": (i, o)} | ({f"{name}/bias": (o,)} if bias else {})


def norm(name, width):
    return {f"{name}/scale": (width,), f"{name}/bias": (width,)}


def resnet(name, i, o, time=None):
    found = norm(f"{name}/norm1", i) | conv(f"{name}/conv1", i, o)
    found |= norm(f"{name}/norm2", o) | conv(f"{name}/conv2", o, o)
    found |= {} if time is None else dense(f"{name}/time_emb_proj", time, o)
    return found | ({} if i == o else conv(f"{name}/conv_shortcut", i, o, 1))


def transformer(name, width):
    found = norm(f"{name}/norm", width)
    found |= conv(f"{name}/proj_in", width, width, 1) | conv(f"{name}/proj_out", width, width, 1)
    block = f"{name}/transformer_blocks_0"
    for attn, source in (("attn1", width), ("attn2", CONTEXT)):
        found |= dense(f"{block}/{attn}/to_q", width, width, bias=False)
        found |= dense(f"{block}/{attn}/to_k", source, width, bias=False)
        found |= dense(f"{block}/{attn}/to_v", source, width, bias=False)
        found |= dense(f"{block}/{attn}/to_out_0", width, width)
    found |= dense(f"{block}/ff/net_0/proj", width, 8 * width)
    found |= dense(f"{block}/ff/net_2", 4 * width, width)
    for i in (1, 2, 3):
        found |= norm(f"{block}/norm{i}", width)
    return found


def unet():
    w, time = WIDTH, 4 * WIDTH
    return {
        **conv("conv_in", 4, w),
        **dense("time_embedding/linear_1", w, time),
        **dense("time_embedding/linear_2", time, time),
        **resnet("down_blocks_0/resnets_0", w, w, time),
        **transformer("down_blocks_0/attentions_0", w),
        **conv("down_blocks_0/downsamplers_0/conv", w, w),
        **resnet("down_blocks_1/resnets_0", w, 2 * w, time),
        **resnet("mid_block/resnets_0", 2 * w, 2 * w, time),
        **transformer("mid_block/attentions_0", 2 * w),
        **resnet("mid_block/resnets_1", 2 * w, 2 * w, time),
        **resnet("up_blocks_0/resnets_0", 4 * w, 2 * w, time),
        **resnet("up_blocks_0/resnets_1", 3 * w, 2 * w, time),
        **conv("up_blocks_0/upsamplers_0/conv", 2 * w, 2 * w),
        **resnet("up_blocks_1/resnets_0", 3 * w, w, time),
        **transformer("up_blocks_1/attentions_0", w),
        **resnet("up_blocks_1/resnets_1", 2 * w, w, time),
        **transformer("up_blocks_1/attentions_1", w),
        **norm("conv_norm_out", w),
        **conv("conv_out", w, 4),
    }


def middle(name, width):
    found = norm(f"{name}/attentions_0/group_norm", width)
    for part in ("query", "key", "value", "proj_attn"):
        found |= dense(f"{name}/attentions_0/{part}", width, width)
    return found | {
        k: x for i in (0, 1) for k, x in resnet(f"{name}/resnets_{i}", width, width).items()
    }


def vae():
    w = WIDTH
    return {
        **conv("encoder/conv_in", 3, w), **resnet("encoder/down_blocks_0/resnets_0", w, w),
        **conv("encoder/down_blocks_0/downsamplers_0/conv", w, w),
        **resnet("encoder/down_blocks_1/resnets_0", w, 2 * w), **middle("encoder/mid_block", 2 * w),
        **norm("encoder/conv_norm_out", 2 * w), **conv("encoder/conv_out", 2 * w, 8),
        **conv("quant_conv", 8, 8, 1), **conv("post_quant_conv", 4, 4, 1),
        **conv("decoder/conv_in", 4, 2 * w), **middle("decoder/mid_block", 2 * w),
        **resnet("decoder/up_blocks_0/resnets_0", 2 * w, 2 * w),
        **resnet("decoder/up_blocks_0/resnets_1", 2 * w, 2 * w),
        **conv("decoder/up_blocks_0/upsamplers_0/conv", 2 * w, 2 * w),
        **resnet("decoder/up_blocks_1/resnets_0", 2 * w, w),
        **resnet("decoder/up_blocks_1/resnets_1", w, w), **norm("decoder/conv_norm_out", w),
        **conv("decoder/conv_out", w, 3),
    }  # fmt: skip


def text_encoder():
    found = {
        "embeddings/token_embedding/embedding": (WORDS, CONTEXT),
        "embeddings/position_embedding/embedding": (16, CONTEXT),
        **norm("final_layer_norm", CONTEXT),
    }
    for i in range(2):
        layer = f"encoder/layers/{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= dense(f"{layer}/self_attn/{part}", CONTEXT, CONTEXT)
        found |= dense(f"{layer}/mlp/fc1", CONTEXT, 64) | dense(f"{layer}/mlp/fc2", 64, CONTEXT)
        found |= norm(f"{layer}/layer_norm1", CONTEXT) | norm(f"{layer}/layer_norm2", CONTEXT)
    return {f"text_model/{name}": shape for name, shape in found.items()}


PARTS = {
    "unet": ("unet", "diffusion_flax_model.msgpack", UNET, unet()),
    "first_stage": ("vae", "diffusion_flax_model.msgpack", VAE, vae()),
    "cond_stage": ("text_encoder", "flax_model.msgpack", TEXT, text_encoder()),
}


def tree(shapes, dtype=np.float32):
    return traverse_util.unflatten_dict(
        {name: weight(name, shape).astype(dtype) for name, shape in shapes.items()}, sep="/"
    )


def write(folder, dtype=np.float32):
    """The folder, with all its files but those of the safety checker."""
    for name, file, options, shapes in PARTS.values():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(options))
        content = serialization.to_bytes(tree(shapes, dtype))
        (folder / name / file).write_bytes(content)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    text_model.clip_tokenizer(folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return folder


def same(params, shapes, dtype=np.float32):
    flat = traverse_util.flatten_dict(params, sep="/")
    assert flat.keys() == shapes.keys()
    for name, shape in shapes.items():
        expected = weight(name, shape).astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(flat[name], expected, err_msg=name)
    return True


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_every_component_is_read_as_it_is(tmp_path, dtype):
    model = loading.load(write(tmp_path / "old", dtype))
    for kind, (_, _, _, shapes) in PARTS.items():
        assert same(model.params[kind], shapes, dtype)
        assert {x.dtype.name for x in traverse_util.flatten_dict(model.params[kind]).values()} == {
            "float32"
        }
    assert model.latent_scale == 0.18215
    assert model.config.unet.num_heads == 4
    assert (model.config.diffusion.schedule, model.config.sampling.steps_offset) == (
        "scaled_linear", 1,
    )  # fmt: skip
    assert model.tokenizer.encode(["red"]).shape == (1, 16)


def test_one_component(tmp_path):
    folder = write(tmp_path / "old")
    assert same(diffusers.load_unet(folder)[0], unet())
    assert same(diffusers.load_text_encoder(folder / "text_encoder")[0], text_encoder())


def test_names_that_do_not_fit_are_listed(tmp_path):
    folder = write(tmp_path / "old")
    shapes = unet()
    shapes["down_blocks_0/extra/kernel"] = shapes.pop("conv_out/bias")
    path = folder / "unet" / "diffusion_flax_model.msgpack"
    path.write_bytes(serialization.to_bytes(tree(shapes)))
    with pytest.raises(ValueError, match="missing conv_out/bias; unknown down_blocks_0/extra") as e:
        loading.load(folder)
    assert str(e.value).startswith(str(path))
