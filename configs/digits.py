"""scikit-learn's handwritten digits, 16x16: both stages in a few minutes on two CPU cores.

    ldm-train digits:first_stage --workdir runs/first_stage
    ldm-train digits --workdir runs/ldm --first-stage.path runs/first_stage
    ldm-sample class2img --model runs/ldm --out runs/samples

`make demo` runs all of it and measures the samples. `digits:gan` is the first stage against a
discriminator in the second half of its training.
"""

import dataclasses

from ldm_jax import schema

DATA = schema.DataConfig(
    source=schema.TFDSConfig(name="sklearn_digits"), size=16, channels=1, crop="none"
)


def get_config(stage: str = "ldm") -> schema.TrainConfig:
    """`first_stage`, `gan` or `ldm`."""
    stages = {"first_stage": first_stage, "gan": gan, "ldm": ldm}
    if stage not in stages:
        raise ValueError(f"digits has no stage {stage!r}; it has {', '.join(stages)}")
    return stages[stage]()


def first_stage() -> schema.AutoencoderTrainConfig:
    """KL autoencoder, f4: 16x16 pixels to a 4x4 latent."""
    return schema.AutoencoderTrainConfig(
        data=DATA,
        model=schema.AutoencoderKLConfig(
            in_channels=1,
            out_channels=1,
            channels=32,
            channel_mult=(1, 2, 2),
            num_res_blocks=1,
            z_channels=4,
            embed_dim=4,
        ),
        optimizer=schema.OptimizerConfig(
            learning_rate=2e-3,
            schedule="cosine",
            warmup_steps=20,
            decay_steps=800,
            b2=0.99,
            weight_decay=0.0,
            clip_norm=1.0,
        ),
        batch_size=32,
        steps=800,
        intervals=schema.IntervalConfig(log=20, save=400, snapshot=0, evaluate=200, sample=400),
        eval_batches=12,
    )


def gan() -> schema.AutoencoderTrainConfig:
    """The same against a discriminator of patches of 16 pixels, from half of its steps on."""
    config = first_stage()
    return dataclasses.replace(
        config,
        loss=schema.FirstStageLossConfig(disc_start=config.steps // 2, disc_weight=0.5),
        discriminator=schema.DiscriminatorConfig(width=32, layers=1),
        disc_optimizer=dataclasses.replace(config.optimizer, learning_rate=5e-4),
    )


def ldm() -> schema.LatentDiffusionTrainConfig:
    """Class-conditional UNet on the 4x4 latents."""
    return schema.LatentDiffusionTrainConfig(
        data=DATA,
        unet=schema.UNetConfig(
            in_channels=4,
            out_channels=4,
            model_channels=128,
            channel_mult=(1,),
            num_res_blocks=2,
            attention_downsample=(1,),
            num_heads=None,
            num_head_channels=32,
            context_dim=128,
        ),
        cond=schema.ClassCondConfig(num_classes=10, embed_dim=128),
        diffusion=schema.DiffusionConfig(beta_start=0.0015, beta_end=0.0195),
        optimizer=schema.OptimizerConfig(
            learning_rate=1e-3, schedule="cosine", warmup_steps=20, decay_steps=900, clip_norm=1.0
        ),
        ema=schema.EMAConfig(decay=0.99),
        batch_size=64,
        steps=900,
        intervals=schema.IntervalConfig(log=20, save=450, snapshot=0, evaluate=150, sample=450),
        eval_batches=5,
        num_samples=20,
    )
