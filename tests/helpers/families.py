"""Small models of every family whose bare checkpoints are recognised."""

import dataclasses

from ldm_jax import schema

FIRST_STAGE = schema.AutoencoderKLConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1)


UNET = schema.UNetConfig(
    model_channels=64, channel_mult=(1, 2, 2), num_res_blocks=1, attention_downsample=(2, 1),
    context_dim=64,
)  # fmt: skip


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
    SECOND, schema.HybridCondConfig(OPEN_TEXT, schema.UpscaleCondConfig()),
    schema.DiffusionConfig(beta_start=1e-4, beta_end=0.02, prediction="v"), size=512,
    first_stage=F4, in_channels=7, num_classes=1000, num_heads=8, num_head_channels=None,
    attention_downsample=(4, 2), channel_mult=(1, 2, 4), context_dim=64,
    only_cross_attention=(True, True, False),
)  # fmt: skip


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
