"""TAESD's decoder: previews of the latents of Stable Diffusion in a fraction of the time.

Layers are named as in diffusers' AutoencoderTiny.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

BLOCKS = (3, 3, 3, 1)  # at each size, from small to large
SCALE = 8  # pixels of a side of a latent pixel


class TinyDecoder(nn.Module):
    """Scaled latents [B, h, w, z] -> images [B, 8 h, 8 w, 3] in about [-1, 1]."""

    width: int = 64

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        x = 3 * jnp.tanh(z / 3)
        x = nn.relu(_conv(self.width, "layers_0")(x))
        number = 2  # the activation has one too
        for size, blocks in enumerate(BLOCKS):
            for _ in range(blocks):
                x = _Block(self.width, name=f"layers_{number}")(x)
                number += 1
            if size == len(BLOCKS) - 1:
                return 2 * _conv(3, f"layers_{number}")(x) - 1
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            x = _conv(self.width, f"layers_{number + 1}", bias=False)(x)
            number += 2
        raise AssertionError


class _Block(nn.Module):
    """Three convolutions beside the input."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.relu(_conv(self.width, "conv_0")(x))
        h = nn.relu(_conv(self.width, "conv_2")(h))
        return nn.relu(_conv(self.width, "conv_4")(h) + x)


def _conv(width: int, name: str, bias: bool = True) -> nn.Conv:
    return nn.Conv(width, (3, 3), padding=1, use_bias=bias, name=name)
