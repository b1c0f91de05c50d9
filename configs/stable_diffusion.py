r"""Stable Diffusion v1 on captioned pictures, at the size and with the rates of its authors.

    ldm-train encode stable_diffusion --workdir LATENTS --first-stage.path SD \
        --data.source.path IMAGES
    ldm-train stable_diffusion --workdir runs/sd --cache.path LATENTS --first-stage.path SD \
        --cond.path SD --data.source.path IMAGES
    ldm-train stable_diffusion:1024 ...  # 1024x1024, blocks recomputed in the backward pass
    ldm-train plan stable_diffusion --cached --topology v5e:4x4 --batch-size 128

IMAGES holds NAME.txt beside NAME.jpg. SD is a diffusers folder of Stable Diffusion v1: its first
stage and its text encoder, ViT-L/14, are frozen. UNet, noise and scale are those of
`v1-inference.yaml` (CompVis/stable-diffusion); batch, rate and warm-up those of the model card.
Parameters, moments and average take 13.8 GB, so they are split over all devices (`mesh.fsdp`); on
TPU slices over some are enough, as `--mesh.data -1 --mesh.fsdp 4`, and send less. A batch of 2048
on few devices takes `--accumulate`. Not trained here.
"""

import dataclasses

from ldm_jax import schema
from ldm_jax.configs import first_stages


def get_config(stage: str = "512") -> schema.TrainConfig:
    """`512` or `1024` (pixels a side), or `first_stage`: kl-f8."""
    stages = {"512": at_512, "1024": at_1024}
    if stage == "first_stage":
        return first_stages.get_config("kl-f8")
    if stage not in stages:
        raise ValueError(f"stable_diffusion has no stage {stage!r}; it has 512, 1024, first_stage")
    return stages[stage]()


def at_512() -> schema.LatentDiffusionTrainConfig:
    """860 M parameters, rate 1e-4 after 10 000 steps of warm-up, batch 2048."""
    return schema.LatentDiffusionTrainConfig(
        data=schema.DataConfig(
            source=schema.FolderConfig(captions="sidecar"), size=512, crop="center"
        ),
        first_stage=schema.FirstStageConfig(scale=0.18215),
        unet=schema.UNetConfig(),
        cond=schema.TextCondConfig(encoder=schema.CLIPTextConfig(), trainable=False),
        optimizer=schema.OptimizerConfig(learning_rate=1e-4, warmup_steps=10_000),
        ema=schema.EMAConfig(parts=("unet",)),
        mesh=schema.MeshConfig(data=1, fsdp=-1),
        batch_size=2048,
        dtype="bfloat16",
        steps=500_000,
        sample_guidance=7.5,
    )


def at_1024() -> schema.LatentDiffusionTrainConfig:
    """The same on four times the pixels: a quarter of the batch, and remat."""
    config = at_512()
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, size=1024), batch_size=512, remat=True
    )
