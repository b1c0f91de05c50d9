"""Updates of one array of a model, in the ways that adapter files write them.

Kernels are ours: [in, out] of a dense layer, [h, w, in, out] of a convolution. Each class has
`value(shape)`, the update in float32, of the kernel's shape.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

HIGHEST = jax.lax.Precision.HIGHEST


@struct.dataclass
class LowRank:
    """down @ up, of rank r (Hu et al. 2021, LoRA).

    down: [in, r], or [h, w, in, r] of a convolution; up: [r, out].
    """

    down: jax.Array
    up: jax.Array

    @property
    def rank(self) -> int:
        return self.up.shape[0]

    def value(self, shape: tuple[int, ...]) -> jax.Array:
        down, up = (jnp.asarray(x, jnp.float32) for x in (self.down, self.up))
        # one tensor may say a 1x1 convolution, the other a dense layer: the same numbers
        return jnp.matmul(down, up, precision=HIGHEST).reshape(shape)


@struct.dataclass
class Hadamard:
    """Two updates of low rank, multiplied element by element (Hyeon-Woo et al. 2021, LoHa)."""

    first: LowRank
    second: LowRank

    @property
    def rank(self) -> int:
        return self.first.rank

    def value(self, shape: tuple[int, ...]) -> jax.Array:
        return self.first.value(shape) * self.second.value(shape)


@struct.dataclass
class Kronecker:
    """Kronecker product of two small kernels (Edalati et al. 2022; LoKr of LyCORIS).

    first: [in, out]; second: [in, out] or [h, w, in, out].
    """

    first: jax.Array
    second: jax.Array
    rank: int | None = struct.field(pytree_node=False)
    """None where neither factor is of low rank: alpha has no meaning then."""

    def value(self, shape: tuple[int, ...]) -> jax.Array:
        first, second = (jnp.asarray(x, jnp.float32) for x in (self.first, self.second))
        first = first.reshape((1,) * (second.ndim - 2) + first.shape)
        return jnp.kron(first, second).reshape(shape)


@struct.dataclass
class Full:
    """An update of every number: of a kernel, a bias, or the scale of a norm."""

    array: jax.Array
    rank: None = struct.field(pytree_node=False, default=None)

    def value(self, shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(self.array, jnp.float32).reshape(shape)


Delta = LowRank | Hadamard | Kronecker | Full


@struct.dataclass
class Update:
    """`scale` times a delta, and with a magnitude what DoRA makes of the sum (Liu et al. 2024).

    magnitude: what the norms of the summed kernel become, [out], or [in, 1] where a norm is over
        everything that one input channel meets; None is LoRA's plain sum.
    scale: alpha / rank, or what the file says in its place.
    """

    delta: Delta
    scale: float = struct.field(pytree_node=False, default=1.0)
    magnitude: Any = None

    def added(self, weight: jax.Array) -> jax.Array:
        """The change of `weight` (float32) at a multiplier of 1."""
        change = self.scale * self.delta.value(weight.shape)
        if self.magnitude is None:
            return change
        whole = weight + change
        kept = whole.ndim - (2 if self.magnitude.ndim == 2 else 1)  # the axis that has a norm each
        axes = tuple(axis for axis in range(whole.ndim) if axis != kept)
        norm = jnp.sqrt(jnp.sum(whole**2, axis=axes, keepdims=True))
        return whole * jnp.reshape(self.magnitude, norm.shape) / norm - weight

    @property
    def alpha(self) -> float:
        """The number that scale is the quotient of, with the rank."""
        return self.scale * (self.delta.rank or 1)


def size(delta: Delta) -> int:
    """Numbers that an update holds."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(delta))
