r"""The nine released first stages, and those of the paper's Table 8 that were not released.

    ldm-train first_stages:kl-f8 --workdir runs/kl-f8 --data.source.path IMAGES \
        --loss.perceptual-vgg vgg16-397923af.pth --loss.perceptual-lin vgg.pth

Models and losses are those of `models/first_stage_models` (CompVis/latent-diffusion), for images of
256x256 cut from pictures of 384 pixels a side or more; the paper took OpenImages. The learning rate
is the reference's on one device, 4.5e-6 for each image of a batch. Latents of z 16 in `kl-f32-z16`
and the like, and codebooks in `vq-f4-n256`; the paper does not print the widths of the models that
were not released: they are those of the nearest released one here. Not trained here; the README of
the reference gives R-FIDs between 0.27 (kl-f4, 176 991 steps) and 5.15 (vq-f16).
"""

from ldm_jax import schema

# (width of each level over 128, levels with attention by downsampling factor)
F2 = (1, 2), ()
F4 = (1, 2, 4), ()
KL_F8, VQ_F8 = ((1, 2, 4, 4), ()), ((1, 2, 2, 4), (8,))
F16 = (1, 1, 2, 2, 4), (16,)
F32 = (1, 1, 2, 2, 4, 4), (16, 32)

# (levels, channels of the latent, batch)
KL = {
    "kl-f4": (F4, 3, 10),
    "kl-f8": (KL_F8, 4, 4),
    "kl-f16": (F16, 16, 6),
    "kl-f32": (F32, 64, 6),
    "kl-f2": (F2, 2, 10),
    "kl-f16-z8": (F16, 8, 6),
    "kl-f32-z16": (F32, 16, 6),
}
# (levels, channels of the latent, codes, batch, disc_start, disc_weight, discriminator's layers)
VQ = {
    "vq-f4": (F4, 3, 8192, 8, 0, 0.75, 3),
    "vq-f4-noattn": (F4, 3, 8192, 8, 11, 0.75, 3),
    "vq-f8": (VQ_F8, 4, 16384, 10, 1, 0.6, 2),
    "vq-f8-n256": (VQ_F8, 4, 256, 10, 250001, 0.75, 3),
    "vq-f16": (F16, 8, 16384, 14, 250001, 0.75, 2),
    "vq-f2": (F2, 2, 2048, 8, 0, 0.75, 3),
    "vq-f2-n64": (F2, 2, 64, 8, 0, 0.75, 3),
    "vq-f4-n256": (F4, 3, 256, 8, 0, 0.75, 3),
    "vq-f32": (F32, 16, 16384, 14, 250001, 0.75, 2),
}
RELEASED = ("kl-f4", "kl-f8", "kl-f16", "kl-f32")
RELEASED += ("vq-f4", "vq-f4-noattn", "vq-f8", "vq-f8-n256", "vq-f16")
RATE = 4.5e-6  # for each image of a batch


def get_config(stage: str = "kl-f8") -> schema.TrainConfig:
    """By the name of the released folder, as `kl-f8` or `vq-f4-noattn`."""
    if stage in KL:
        return kl(*KL[stage])
    if stage in VQ:
        return vq(*VQ[stage], mid_attention=stage != "vq-f4-noattn")
    raise ValueError(f"first_stages has no stage {stage!r}; it has {', '.join((*KL, *VQ))}")


def kl(
    levels: tuple[tuple[int, ...], tuple[int, ...]], channels: int, batch_size: int
) -> schema.AutoencoderTrainConfig:
    """KL latents; the discriminator starts after 50 001 steps."""
    channel_mult, attention = levels
    model = schema.AutoencoderKLConfig(
        channel_mult=channel_mult,
        attention_downsample=attention,
        z_channels=channels,
        embed_dim=channels,
    )
    loss = schema.FirstStageLossConfig(
        kl_weight=1e-6, perceptual_weight=1.0, disc_start=50001, disc_weight=0.5
    )
    return _train(model, loss, batch_size, layers=3)


def vq(
    levels: tuple[tuple[int, ...], tuple[int, ...]],
    channels: int,
    num_codes: int,
    batch_size: int,
    disc_start: int,
    disc_weight: float,
    layers: int,
    *,
    mid_attention: bool,
) -> schema.AutoencoderTrainConfig:
    """Quantized latents; beta weighs the codebook's term, as in the reference."""
    channel_mult, attention = levels
    model = schema.AutoencoderVQConfig(
        channel_mult=channel_mult,
        attention_downsample=attention,
        mid_attention=mid_attention,
        z_channels=channels,
        embed_dim=channels,
        num_codes=num_codes,
    )
    loss = schema.FirstStageLossConfig(
        codebook_weight=1.0, perceptual_weight=1.0, disc_start=disc_start, disc_weight=disc_weight
    )
    return _train(model, loss, batch_size, layers)


def _train(
    model: schema.AutoencoderKLConfig | schema.AutoencoderVQConfig,
    loss: schema.FirstStageLossConfig,
    batch_size: int,
    layers: int,
) -> schema.AutoencoderTrainConfig:
    return schema.AutoencoderTrainConfig(
        data=schema.DataConfig(
            source=schema.FolderConfig(), size=256, crop="random", crop_range=(2 / 3, 2 / 3)
        ),
        model=model,
        loss=loss,
        discriminator=schema.DiscriminatorConfig(layers=layers),
        optimizer=schema.OptimizerConfig(
            learning_rate=batch_size * RATE, b1=0.5, b2=0.9, weight_decay=0.0
        ),
        batch_size=batch_size,
        steps=500_000,
    )
