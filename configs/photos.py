r"""Photos that come with scikit-learn and scikit-image: first stages in minutes on two CPU cores.

    pip install 'ldm-jax[demo]'
    ldm-train photos:first_stage --workdir runs/photos_kl_f4
    ldm-train photos --workdir runs/photos_ldm --first-stage.path runs/photos_kl_f4
    ldm-sample unconditional --model runs/photos_ldm --out runs/samples

`first_stage` is `kl_f4`; `kl_f8`, `vq_f4` and `vq_f8` differ only in their latents and in options
that depend on these. `--loss.disc-factor 0` trains without the discriminator.
"""

from ldm_jax import schema

DATA = schema.DataConfig(source=schema.PhotosConfig(crop=64), size=64, crop="none", flip=True)
STEPS = 1000
WIDTHS = {4: (1, 1, 1), 8: (1, 1, 1, 2)}  # of each level over 64
CHANNELS = {4: 3, 8: 4}  # of a latent


def get_config(stage: str = "ldm") -> schema.TrainConfig:
    """`first_stage` (or `kl_f4`), `kl_f8`, `vq_f4`, `vq_f8`; `ldm` on the latents of `kl_f4`."""
    stages = {
        "first_stage": lambda: kl(4),
        "kl_f4": lambda: kl(4),
        "kl_f8": lambda: kl(8),
        "vq_f4": lambda: vq(4),
        "vq_f8": lambda: vq(8),
        "ldm": ldm,
    }
    if stage not in stages:
        raise ValueError(f"photos has no stage {stage!r}; it has {', '.join(stages)}")
    return stages[stage]()


def kl(factor: int) -> schema.AutoencoderTrainConfig:
    """KL latents; errors are summed over an image."""
    model = schema.AutoencoderKLConfig(
        channels=64,  # with 32, a GroupNorm's groups are single channels, which lose their means
        channel_mult=WIDTHS[factor],
        num_res_blocks=1,
        z_channels=CHANNELS[factor],
        embed_dim=CHANNELS[factor],
    )
    loss = schema.FirstStageLossConfig(kl_weight=1e-6, disc_start=STEPS // 2, disc_weight=0.5)
    return _train(model, loss)


def vq(factor: int) -> schema.AutoencoderTrainConfig:
    """1024 codes that follow the latents, revived where nothing takes them; errors averaged."""
    model = schema.AutoencoderVQConfig(
        channels=64,
        channel_mult=WIDTHS[factor],
        num_res_blocks=1,
        z_channels=CHANNELS[factor],
        embed_dim=CHANNELS[factor],
        num_codes=1024,
        legacy=False,
        codebook_decay=0.99,
    )
    loss = schema.FirstStageLossConfig(
        disc_start=STEPS // 2, disc_weight=0.5, revive_codes_after=20
    )
    return _train(model, loss)


def _train(
    model: schema.AutoencoderKLConfig | schema.AutoencoderVQConfig,
    loss: schema.FirstStageLossConfig,
) -> schema.AutoencoderTrainConfig:
    optimizer = schema.OptimizerConfig(
        learning_rate=1e-3,
        schedule="cosine",
        warmup_steps=50,
        decay_steps=STEPS,
        final_fraction=0.05,
        b1=0.5,
        b2=0.9,
        weight_decay=0.0,
        clip_norm=None,
    )
    return schema.AutoencoderTrainConfig(
        data=DATA,
        model=model,
        loss=loss,
        discriminator=schema.DiscriminatorConfig(width=32, layers=2),
        optimizer=optimizer,
        disc_optimizer=schema.OptimizerConfig(
            learning_rate=5e-4, b1=0.5, b2=0.9, weight_decay=0.0
        ),  # constant: it begins to learn where the other's rate has fallen to half
        ema=schema.EMAConfig(decay=0.995, parts=("autoencoder",)),
        batch_size=4,
        steps=STEPS,
        intervals=schema.IntervalConfig(
            log=10, save=STEPS // 2, snapshot=0, evaluate=STEPS // 5, sample=STEPS // 2
        ),
        eval_batches=16,
        num_samples=8,
    )


def ldm() -> schema.LatentDiffusionTrainConfig:
    """Unconditional, on latents of 16x16x3: crops of 64x64 pixels."""
    return schema.LatentDiffusionTrainConfig(
        data=DATA,
        unet=schema.UNetConfig(
            in_channels=CHANNELS[4],
            out_channels=CHANNELS[4],
            model_channels=64,
            channel_mult=(1, 2, 2),
            num_res_blocks=2,
            attention_downsample=(2, 4),
            num_heads=None,
            num_head_channels=32,
            spatial_transformer=False,
            context_dim=None,
        ),
        diffusion=schema.DiffusionConfig(beta_start=0.0015, beta_end=0.0195),
        optimizer=schema.OptimizerConfig(
            learning_rate=5e-4, schedule="cosine", warmup_steps=50, decay_steps=3000, clip_norm=1.0
        ),
        ema=schema.EMAConfig(decay=0.995),
        batch_size=32,
        steps=3000,
        intervals=schema.IntervalConfig(log=20, save=1500, snapshot=0, evaluate=500, sample=1500),
        eval_batches=4,
        num_samples=16,
    )
