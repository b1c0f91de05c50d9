"""Networks of latent diffusion as stateless Flax Linen modules."""

from ldm_jax.models.autoencoder import AutoencoderKL, AutoencoderVQ
from ldm_jax.models.unet import UNet

__all__ = ["AutoencoderKL", "AutoencoderVQ", "UNet"]
