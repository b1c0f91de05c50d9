r"""Your own images: LDM-4 of the paper on a folder, at its real size (256x256, KL-f4).

    ldm-train folder:first_stage --workdir runs/first_stage --data.source.path IMAGES
    ldm-train folder --workdir runs/ldm --data.source.path IMAGES \
        --first-stage.path runs/first_stage
    ldm-train folder:class --cond.num-classes N ...      # IMAGES/CLASS/NAME.jpg
    ldm-train folder:text --cond.tokenizer TOKENIZER ...          # NAME.txt beside NAME.jpg
    ldm-train folder:clip --cond.path STABLE_DIFFUSION ...        # the same

First stage: `autoencoder_kl_64x64x3`; UNet and schedule: `celebahq-ldm-vq-4`, for classes
`cin256-v2` and for text `text2img256` (released configs of CompVis/latent-diffusion). `text`
trains its encoder; `clip` takes ViT-L/14, frozen, from a folder of Stable Diffusion v1. TOKENIZER
is a folder of `bert-base-uncased`. Not trained here.
"""

import dataclasses

from ldm_jax import schema

DATA = schema.DataConfig(source=schema.FolderConfig(), size=256, crop="center", flip=True)
KL_F4 = schema.AutoencoderKLConfig(channel_mult=(1, 2, 4), z_channels=3, embed_dim=3)


def get_config(stage: str = "ldm") -> schema.TrainConfig:
    """`first_stage`, `ldm` (unconditional), `class`, `text` or `clip`."""
    stages = {"first_stage": first_stage, "ldm": ldm, "class": by_class, "text": text, "clip": clip}
    if stage not in stages:
        raise ValueError(f"folder has no stage {stage!r}; it has {', '.join(stages)}")
    return stages[stage]()


def first_stage() -> schema.AutoencoderTrainConfig:
    """KL-f4 with the reference's rate for one device's batch of 12: 12 x 4.5e-6."""
    return schema.AutoencoderTrainConfig(
        data=DATA,
        model=KL_F4,
        optimizer=schema.OptimizerConfig(
            learning_rate=12 * 4.5e-6, b1=0.5, b2=0.9, weight_decay=0.0
        ),
        batch_size=12,
        steps=200_000,
    )


def ldm() -> schema.LatentDiffusionTrainConfig:
    """Unconditional, 274 M parameters; rate 9.6e-5 at batch 48."""
    return schema.LatentDiffusionTrainConfig(
        data=DATA,
        unet=schema.UNetConfig(
            in_channels=3,
            out_channels=3,
            model_channels=224,
            channel_mult=(1, 2, 3, 4),
            attention_downsample=(8, 4, 2),
            num_heads=None,
            num_head_channels=32,
            spatial_transformer=False,
            context_dim=None,
        ),
        diffusion=schema.DiffusionConfig(beta_start=0.0015, beta_end=0.0195),
        optimizer=schema.OptimizerConfig(learning_rate=9.6e-5),
        batch_size=48,
        steps=500_000,
    )


def by_class() -> schema.LatentDiffusionTrainConfig:
    """Classes from folder names, 401 M parameters, 10 % of them dropped for guidance."""
    config = ldm()
    source = schema.FolderConfig(class_from_folder=True)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(DATA, source=source),
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
        optimizer=schema.OptimizerConfig(learning_rate=1e-4),
        batch_size=64,
    )


def text() -> schema.LatentDiffusionTrainConfig:
    """Captions, with a text encoder that trains: 404 M parameters and 186 M of the encoder."""
    config = by_class()
    encoder = schema.BERTTextConfig(width=640, num_layers=32)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(DATA, source=schema.FolderConfig(captions="sidecar")),
        unet=dataclasses.replace(
            config.unet, num_heads=None, num_head_channels=32, context_dim=encoder.width
        ),
        cond=schema.TextCondConfig(encoder=encoder),
        optimizer=schema.OptimizerConfig(learning_rate=5.6e-5),
        batch_size=28,
    )


def clip() -> schema.LatentDiffusionTrainConfig:
    """Captions, read by the frozen text encoder of Stable Diffusion v1."""
    config, encoder = text(), schema.CLIPTextConfig()
    return dataclasses.replace(
        config,
        unet=dataclasses.replace(config.unet, context_dim=encoder.width),
        cond=schema.TextCondConfig(encoder=encoder, trainable=False),
    )
