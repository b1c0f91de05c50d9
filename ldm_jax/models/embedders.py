"""Small learned conditioning encoders: class ids and segmentation maps."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class ClassEmbedder(nn.Module):
    """Class id to one context token: [B] int -> [B, 1, embed_dim] (`encoders/modules.py`).

    `num_embeddings` counts the null class, which is the last id.
    """

    num_embeddings: int
    embed_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, label_b: jax.Array) -> jax.Array:
        # torch's Embedding starts as N(0, 1)
        embed = nn.Embed(
            self.num_embeddings,
            self.embed_dim,
            embedding_init=nn.initializers.normal(1.0),
            dtype=self.dtype,
            name="embedding",
        )
        return embed(label_b)[:, None, :]


class SpatialRescaler(nn.Module):
    """One-hot class map to concat channels: [B, H, W] int -> [B, H / 2**stages, W / 2**stages, c].

    The reference halves with `interpolate(0.5, "bilinear")`, which for even sides is the mean of
    2 x 2 pixels, and may map the channels with a 1 x 1 convolution without bias.
    """

    num_classes: int
    stages: int
    out_channels: int | None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, segmentation_bhw: jax.Array) -> jax.Array:
        x = jax.nn.one_hot(segmentation_bhw, self.num_classes, dtype=self.dtype)
        for _ in range(self.stages):
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        if self.out_channels is None:
            return x
        # torch's Conv2d starts as U(+-1 / sqrt(fan_in))
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        mapper = nn.Conv(
            self.out_channels,
            (1, 1),
            use_bias=False,
            kernel_init=init,
            dtype=self.dtype,
            name="channel_mapper",
        )
        return mapper(x)
