r"""Class-conditional ImageNet at 256x256: `cin256-v2`, whose FID in the paper is 3.60.

    ldm-train encode imagenet --workdir LATENTS --first-stage.path VQ_F4
    ldm-train imagenet --workdir runs/imagenet --cache.path LATENTS --first-stage.path VQ_F4
    ldm-train plan imagenet --cached --topology v5e:4x4 --batch-size 1024

VQ_F4 is the released `vq-f4`, or a run of `imagenet:first_stage`. The images come through TFDS
(`imagenet2012`, prepared in --data.source.data-dir). UNet, noise and the null class are those of
`configs/latent-diffusion/cin256-v2.yaml` of CompVis/latent-diffusion; the paper's batch is 1200
(table 10), for 178 000 steps. Not trained here.
"""

from ldm_jax import schema
from ldm_jax.configs import first_stages


def get_config(stage: str = "cin256-v2") -> schema.TrainConfig:
    """`cin256-v2`, or `first_stage`: vq-f4."""
    if stage == "first_stage":
        return first_stages.get_config("vq-f4")
    if stage != "cin256-v2":
        raise ValueError(f"imagenet has no stage {stage!r}; it has cin256-v2, first_stage")
    return cin256_v2()


def cin256_v2() -> schema.LatentDiffusionTrainConfig:
    """401 M parameters on latents of 64x64x3, which are not rescaled."""
    return schema.LatentDiffusionTrainConfig(
        data=schema.DataConfig(
            source=schema.TFDSConfig(name="imagenet2012", eval_split="validation"),
            size=256,
            crop="center",
            flip=True,
            allow_upscale=True,
        ),
        first_stage=schema.FirstStageConfig(scale=1.0),
        unet=schema.UNetConfig(
            in_channels=3,
            out_channels=3,
            model_channels=192,
            channel_mult=(1, 2, 3, 5),
            attention_downsample=(8, 4, 2),
            num_heads=1,
            context_dim=512,
        ),
        cond=schema.ClassCondConfig(num_classes=1000, embed_dim=512),
        diffusion=schema.DiffusionConfig(beta_start=0.0015, beta_end=0.0195),
        optimizer=schema.OptimizerConfig(learning_rate=1e-4),
        mesh=schema.MeshConfig(data=1, fsdp=-1),
        batch_size=1200,
        dtype="bfloat16",
        steps=178_000,
        sample_guidance=1.5,
    )
