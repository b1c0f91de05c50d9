"""The smallest models that use every part, for tests: seconds on a CPU. Not for pictures.

ldm-train tiny:first_stage --workdir runs/tiny_first_stage
ldm-train tiny:class --workdir runs/tiny --first-stage.path runs/tiny_first_stage
ldm-train tiny:gan --workdir runs/tiny_gan
ldm-train tiny:text --workdir runs/tiny_text --first-stage.path runs/tiny_first_stage
"""

import dataclasses

from ldm_jax import schema

DATA = schema.DataConfig(
    source=schema.SyntheticConfig(num_images=64, size=16, num_classes=4), size=16, threads=2
)
EVERY = schema.IntervalConfig(log=1, save=4, snapshot=0, evaluate=0, sample=0)
LATENT = 4  # channels
WIDTH = 32  # of a context token

TEXT = schema.TextCondConfig(
    encoder=schema.BERTTextConfig(
        vocab_size=257, max_length=20, width=WIDTH, num_layers=1, num_heads=2, head_width=16
    ),
    tokenizer="bytes",
)
CONDITIONS: dict[str, schema.CondConfig] = {
    "unconditional": None,
    "class": schema.ClassCondConfig(num_classes=4, embed_dim=WIDTH),
    "label": schema.ClassCondConfig(num_classes=4, via="label"),
    "inpaint": schema.InpaintCondConfig(),
    "superres": schema.SuperResCondConfig(factor=2),
    "semantic": schema.SemanticCondConfig(num_classes=5, out_channels=3, stages=1),
    "text": TEXT,
    "clip": schema.TextCondConfig(  # needs --cond.path
        encoder=schema.CLIPTextConfig(
            vocab_size=257, max_length=20, width=WIDTH, num_layers=2, num_heads=2, mlp_width=64
        ),
        trainable=False,
        tokenizer="bytes",
    ),
    "hybrid": schema.HybridCondConfig(text=TEXT, concat=schema.InpaintCondConfig()),
}
# channels beside the latent
CONCAT = {"inpaint": LATENT + 1, "superres": 3, "semantic": 3, "hybrid": LATENT + 1}


def get_config(stage: str = "class") -> schema.TrainConfig:
    """`first_stage`, `gan`, `vq`, or an LDM by its condition: `unconditional`, `class`, ..."""
    first_stages = {"first_stage": first_stage, "gan": gan, "vq": vq}
    if stage in first_stages:
        return first_stages[stage]()
    if stage not in CONDITIONS:
        names = ", ".join((*first_stages, *CONDITIONS))
        raise ValueError(f"tiny has no stage {stage!r}; it has {names}")
    return ldm(stage)


def first_stage() -> schema.AutoencoderTrainConfig:
    """KL autoencoder, f2: 16x16 pixels to 8x8x4."""
    return schema.AutoencoderTrainConfig(
        data=DATA,
        model=schema.AutoencoderKLConfig(
            channels=32, channel_mult=(1, 1), num_res_blocks=1, embed_dim=LATENT, z_channels=LATENT
        ),
        optimizer=schema.OptimizerConfig(learning_rate=1e-3, b1=0.5, b2=0.9),
        batch_size=8,
        steps=8,
        intervals=EVERY,
        eval_batches=2,
        num_samples=4,
    )


def gan() -> schema.AutoencoderTrainConfig:
    """The same with a discriminator from the fourth step on."""
    return dataclasses.replace(
        first_stage(),
        loss=schema.FirstStageLossConfig(disc_start=3, lecam_weight=0.1),
        discriminator=schema.DiscriminatorConfig(width=8, layers=2),
        ema=schema.EMAConfig(decay=0.9, parts=("autoencoder",)),
    )


def vq() -> schema.AutoencoderTrainConfig:
    """A codebook of 32 that follows its latents, and a discriminator from the first step on."""
    return dataclasses.replace(
        gan(),
        model=schema.AutoencoderVQConfig(
            channels=32,
            channel_mult=(1, 1),
            num_res_blocks=1,
            embed_dim=LATENT,
            z_channels=LATENT,
            num_codes=32,
            legacy=False,
            codebook_decay=0.9,
        ),
        loss=schema.FirstStageLossConfig(disc_start=0, disc_weight=0.75, revive_codes_after=2),
    )


def ldm(condition: str) -> schema.LatentDiffusionTrainConfig:
    """One residual block per level, attention at the lower one."""
    cond = CONDITIONS[condition]
    by_label = isinstance(cond, schema.ClassCondConfig) and cond.via == "label"
    by_context = condition in ("class", "text", "clip", "hybrid")
    return schema.LatentDiffusionTrainConfig(
        data=dataclasses.replace(DATA, flip=True),
        unet=schema.UNetConfig(
            in_channels=LATENT + CONCAT.get(condition, 0),
            out_channels=LATENT,
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_downsample=(2,),
            num_heads=2,
            spatial_transformer=by_context,
            context_dim=WIDTH if by_context else None,
            num_classes=cond.num_classes + 1 if by_label else None,
        ),
        cond=cond,
        optimizer=schema.OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        ema=schema.EMAConfig(decay=0.9),
        batch_size=8,
        steps=8,
        intervals=EVERY,
        eval_batches=2,
        num_samples=4,
        sample_steps=4,
    )
