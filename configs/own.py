r"""Your own pictures at 64x64, on a laptop: the folder is the only option.

    ldm-train own:first_stage --workdir runs/own_first_stage --data.source.path PICTURES
    ldm-train own --workdir runs/own --data.source.path PICTURES \
        --first-stage.path runs/own_first_stage
    ldm-sample unconditional --model runs/own --out runs/own_samples
    ldm-train own:class ...      # PICTURES/CLASS/NAME.jpg; sampled by class2img --labels 0 1
    ldm-train own:captions ...   # NAME.txt beside NAME.jpg; sampled by text2img --prompt "..."

Grey or RGB, and the number of classes, are read from the folder. Needs 2 GB of memory. Half of the
pictures are mirrored: `--data.no-flip` where left and right matter, as in letters. On a GPU widen
it: `--model.channels 128`, `--unet.model-channels 128`. Never below 64: GroupNorm has 32 groups,
and a group of one channel takes the channel's mean away, so that flat areas come out grey.
"""

import dataclasses
from typing import Any

from ldm_jax import schema

LATENT = 3  # channels, of 16x16 pixels
STEPS = 2000  # of the first stage
UNKNOWN = schema.ImageFacts()  # without a folder, as for --help


def get_config(stage: str = "ldm", facts: schema.ImageFacts = UNKNOWN) -> schema.TrainConfig:
    """`first_stage`, `ldm` (unconditional), `class` or `captions`, for pictures of these facts."""
    stages = {"first_stage": first_stage, "ldm": ldm, "class": by_class, "captions": captions}
    if stage not in stages:
        raise ValueError(f"own has no stage {stage!r}; it has {', '.join(stages)}")
    return stages[stage](facts)


def first_stage(facts: schema.ImageFacts) -> schema.AutoencoderTrainConfig:
    """KL autoencoder, f4, against a discriminator from half of its steps on: `photos` on yours."""
    learning = schema.OptimizerConfig(
        learning_rate=1e-3,
        schedule="cosine",
        warmup_steps=50,
        decay_steps=STEPS,
        final_fraction=0.05,
        b1=0.5,
        b2=0.9,
        weight_decay=0.0,
    )
    return schema.AutoencoderTrainConfig(
        data=_data(facts),
        model=schema.AutoencoderKLConfig(
            in_channels=facts.channels,
            out_channels=facts.channels,
            channels=64,
            channel_mult=(1, 1, 1),
            num_res_blocks=1,
            z_channels=LATENT,
            embed_dim=LATENT,
        ),
        loss=schema.FirstStageLossConfig(disc_start=STEPS // 2),
        discriminator=schema.DiscriminatorConfig(width=32, layers=2),
        optimizer=learning,
        disc_optimizer=schema.OptimizerConfig(learning_rate=5e-4, b1=0.5, b2=0.9, weight_decay=0.0),
        ema=schema.EMAConfig(decay=0.995, parts=("autoencoder",)),
        batch_size=4,
        steps=STEPS,
        intervals=schema.IntervalConfig(log=10, save=500, snapshot=0, evaluate=500, sample=500),
        eval_batches=4,
    )


def ldm(facts: schema.ImageFacts) -> schema.LatentDiffusionTrainConfig:
    """Unconditional, on latents of 16x16."""
    return schema.LatentDiffusionTrainConfig(
        data=_data(facts),
        unet=schema.UNetConfig(
            in_channels=LATENT,
            out_channels=LATENT,
            model_channels=64,
            channel_mult=(1, 2, 2),
            attention_downsample=(2, 4),
            num_heads=None,
            num_head_channels=32,
            spatial_transformer=False,
            context_dim=None,
        ),
        diffusion=schema.DiffusionConfig(beta_start=0.0015, beta_end=0.0195),
        optimizer=schema.OptimizerConfig(
            learning_rate=5e-4, schedule="cosine", warmup_steps=50, decay_steps=4000, clip_norm=1.0
        ),
        ema=schema.EMAConfig(decay=0.995),
        batch_size=32,
        steps=4000,
        intervals=schema.IntervalConfig(log=10, save=500, snapshot=0, evaluate=500, sample=500),
        eval_batches=2,
    )


def by_class(facts: schema.ImageFacts) -> schema.LatentDiffusionTrainConfig:
    """The name of a picture's folder is its class."""
    cond = schema.ClassCondConfig(num_classes=facts.num_classes, embed_dim=128)
    return _conditioned(facts, cond, cond.embed_dim, class_from_folder=True)


def captions(facts: schema.ImageFacts) -> schema.LatentDiffusionTrainConfig:
    """The text beside a picture, read byte by byte by an encoder that trains along."""
    encoder = schema.BERTTextConfig(
        vocab_size=257, max_length=96, width=128, num_layers=4, num_heads=4, head_width=32
    )
    cond = schema.TextCondConfig(encoder=encoder, tokenizer="bytes")
    return _conditioned(facts, cond, encoder.width, captions="sidecar")


def _data(facts: schema.ImageFacts, **source: Any) -> schema.DataConfig:
    folder = schema.FolderConfig(**source)
    return schema.DataConfig(
        source=folder, size=64, channels=facts.channels, flip=True, allow_upscale=True
    )


def _conditioned(
    facts: schema.ImageFacts, cond: schema.CondConfig, width: int, **source: Any
) -> schema.LatentDiffusionTrainConfig:
    """`ldm` with cross-attention to tokens of `width`."""
    config = ldm(facts)
    unet = dataclasses.replace(config.unet, spatial_transformer=True, context_dim=width)
    return dataclasses.replace(config, data=_data(facts, **source), unet=unet, cond=cond)
