"""A latent diffusion model as one frozen bundle: modules, parameters, schedule, scale."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax import conditioning, diffusion, schema
from ldm_jax.conditioning import Cond
from ldm_jax.models import autoencoder, unet
from ldm_jax.models.convolution import xla


@dataclasses.dataclass(frozen=True)
class LatentDiffusion:
    """Modules and parameters of a model that samples; not a pytree: pass `.params` to jit."""

    unet: Any
    first_stage: Any
    cond_stage: Any
    """Module, or None if no conditioning is learned."""
    params: dict
    """{"unet", "first_stage", "cond_stage"}; cond_stage is {} without a module."""
    schedule: diffusion.Schedule
    prediction: str
    """What the UNet predicts: "eps", "x0" or "v"."""
    latent_scale: float
    config: schema.LatentDiffusionConfig

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of the latent of a training image."""
        side = self.config.size // self.config.first_stage.downsample
        return side, side, self.config.first_stage.embed_dim


def build(
    config: schema.LatentDiffusionConfig,
    params: dict,
    latent_scale: float,
    *,
    dtype: Any = jnp.float32,
    attention: Callable | None = None,
    convolution: Callable = xla,
) -> LatentDiffusion:
    """The bundle of a config: `params` as in `LatentDiffusion.params`.

    `attention` and `convolution` are what `choose` of their modules gives for the target devices.
    """
    execution = {"dtype": dtype} | ({} if attention is None else {"attention": attention})
    return LatentDiffusion(
        unet=unet.from_config(config.unet, convolution=convolution, **execution),
        first_stage=autoencoder.from_config(config.first_stage, **execution),
        cond_stage=conditioning.build(config.cond, dtype),
        params=params,
        schedule=diffusion.from_config(config.diffusion),
        prediction=config.diffusion.prediction,
        latent_scale=latent_scale,
        config=config,
    )


def bind(unet: Any, params: dict) -> Callable:
    """The UNet as model(x, t, cond) -> raw prediction; concat conditioning joins x's channels."""

    def model(x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
        if cond.concat is not None:
            x = jnp.concatenate([x, cond.concat.astype(x.dtype)], axis=-1)
        out = unet.apply({"params": params}, x, t, cond.context, cond.label)
        return out.astype(jnp.float32)

    return model


def check(config: schema.LatentDiffusionConfig, image_channels: int = 3) -> None:
    """ValueError if the parts of a model do not fit each other, naming both numbers."""
    z, cond, net = config.first_stage.embed_dim, config.cond, config.unet
    extra = conditioning.concat_channels(cond, z, image_channels)
    if net.in_channels != z + extra:
        raise ValueError(
            f"unet.in_channels is {net.in_channels}, but the latent has {z} channels"
            f" and the conditioning adds {extra}: set it to {z + extra}"
        )
    if net.out_channels != z:
        raise ValueError(f"unet.out_channels is {net.out_channels}, but the latent has {z}")
    if isinstance(cond, schema.ClassCondConfig):
        if cond.via == "label" and net.num_classes != cond.num_classes + 1:
            raise ValueError(
                f"unet.num_classes is {net.num_classes}: with cond.via=label it must be"
                f" {cond.num_classes + 1}, the classes and the null class"
            )
        if cond.via == "context" and net.context_dim != cond.embed_dim:
            raise ValueError(
                f"unet.context_dim is {net.context_dim}, but cond.embed_dim is {cond.embed_dim}"
            )
    down = config.first_stage.downsample
    if isinstance(cond, schema.SuperResCondConfig) and cond.factor != down:
        raise ValueError(
            f"cond.factor is {cond.factor}, but the first stage downsamples by {down}:"
            " the low-resolution image must be as large as the latent"
        )
    if isinstance(cond, schema.SemanticCondConfig) and 2**cond.stages != down:
        raise ValueError(
            f"cond.stages is {cond.stages} (divides by {2**cond.stages}), but the first stage"
            f" downsamples by {down}"
        )
    if config.size % down:
        raise ValueError(f"data.size {config.size} is not a multiple of the downsampling {down}")
