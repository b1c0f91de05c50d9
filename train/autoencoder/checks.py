"""Checks of a first stage's config before anything is written."""

from jax.sharding import Mesh

from ldm_jax import data, schema
from ldm_jax.models import discriminator, lpips
from ldm_jax.train.run import startup


def first_stage(config: schema.AutoencoderTrainConfig, stream: data.Stream, mesh: Mesh) -> None:
    """ValueError if config, data and mesh do not fit each other; it names the option."""
    startup.check(config, mesh)
    if config.model.in_channels != config.data.channels:
        raise ValueError(
            f"data.channels is {config.data.channels}, but model.in_channels is"
            f" {config.model.in_channels}"
        )
    if config.data.size % config.model.downsample:
        raise ValueError(
            f"data.size {config.data.size} is not a multiple of the first stage's downsampling"
            f" {config.model.downsample}"
        )
    _ranges(config)
    _latents(config)
    shape = (config.batch_size, config.data.size, config.data.size, config.data.channels)
    if config.discriminator is not None:
        discriminator.check(discriminator.from_config(config.discriminator), shape)
    if config.loss.perceptual_weight:
        lpips.check(shape, shape)
        if config.loss.perceptual_vgg == "random" and config.loss.perceptual_lin:
            raise ValueError(
                f"loss.perceptual_lin {config.loss.perceptual_lin} goes with a file in"
                " loss.perceptual_vgg, not with random features"
            )
    stream.made[0]  # decodes one example, to refuse images that do not fit


def _ranges(config: schema.AutoencoderTrainConfig) -> None:
    least = {
        "kl_weight": 0,
        "perceptual_weight": 0,
        "codebook_weight": 0,
        "revive_codes_after": 0,
        "disc_start": 0,
        "disc_weight": 0,
        "disc_factor": 0,
        "lecam_weight": 0,
        "r1_weight": 0,
        "r1_interval": 1,
    }
    for name, bound in least.items():
        value = getattr(config.loss, name)
        if not value >= bound:
            raise ValueError(f"loss.{name} is {value}, but must be at least {bound}")
    if config.discriminator is None:
        for name in ("lecam_weight", "r1_weight"):
            if getattr(config.loss, name):
                raise ValueError(
                    f"loss.{name} is {getattr(config.loss, name)}, but the config has no"
                    " discriminator to regularize: set it to 0, or start from a config with one"
                )


def _latents(config: schema.AutoencoderTrainConfig) -> None:
    quantized = isinstance(config.model, schema.AutoencoderVQConfig)
    if quantized and config.loss.learn_logvar:
        raise ValueError(
            "loss.learn_logvar is for KL latents; the error of quantized ones has no log-variance"
        )
    revived = config.loss.revive_codes_after
    if revived and not quantized:
        raise ValueError(
            f"loss.revive_codes_after is {revived}, but this first stage has no codes: set it to 0"
        )
    if revived and config.train_only == "decoder":
        raise ValueError(
            f"loss.revive_codes_after is {revived}, but with train_only decoder the codebook stays:"
            " set it to 0"
        )
