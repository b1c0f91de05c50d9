"""Small modules of diffusers and transformers, of every kind that is converted."""

import re

import pytest
from reference import weight

torch = pytest.importorskip("torch", reason="torch is the reference here")

COMMON = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64),
    "layers_per_block": 1,
}  # fmt: skip
CROSS = {
    **COMMON,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
PLAIN = {
    **COMMON, "in_channels": 6, "out_channels": 3,
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"), "attention_head_dim": 8,
}  # fmt: skip
SD2 = {
    **CROSS,
    "use_linear_projection": True,
    "attention_head_dim": (2, 4),
    "upcast_attention": True,
}
UPSCALER = {
    **SD2, "in_channels": 7, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "only_cross_attention": (False, True),
    "num_class_embeds": 20,
}  # fmt: skip
VECTOR = {
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 5,
    "resnet_time_scale_shift": "scale_shift",
}
RESNET = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"), "downsample_type": "resnet",
    "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32,
    "attention_head_dim": None,
}  # fmt: skip
LAYER = re.compile(r"(resnets|attentions|transformer_blocks|samplers)\.\d+$")
UNETS = {
    "sd1": ("UNet2DConditionModel", CROSS),
    "sd2": ("UNet2DConditionModel", SD2),
    "inpaint": ("UNet2DConditionModel", {**CROSS, "in_channels": 9}),
    "depth": ("UNet2DConditionModel", {**SD2, "in_channels": 5, **VECTOR}),
    "upscaler": ("UNet2DConditionModel", UPSCALER),
    "superres": ("UNet2DModel", PLAIN),
    "resnet": ("UNet2DModel", {**PLAIN, **RESNET}),
}
AUTO = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "sample_size": 16,
}
ATTENDING = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
}
FIRST_STAGES = {
    "kl": ("AutoencoderKL", AUTO),
    "kl attention": ("AutoencoderKL", {**AUTO, **ATTENDING, "in_channels": 1, "out_channels": 1}),
    "kl no attention": ("AutoencoderKL", {**AUTO, "mid_block_add_attention": False}),
    "vq": ("VQModel", {**AUTO, "num_vq_embeddings": 40, "vq_embed_dim": 2}),
    "vq no attention": ("VQModel", {**AUTO, "mid_block_add_attention": False}),
}


def made(name, options):
    """A module of diffusers with weights by formula."""
    import diffusers as theirs

    return by_formula(getattr(theirs, name)(**options).eval())


def by_formula(module):
    """The module with weights so large that each of its operations shows in its output."""
    state = {k: torch.tensor(weight(k, tuple(x.shape))) for k, x in module.state_dict().items()}
    module.load_state_dict(state)
    return module
