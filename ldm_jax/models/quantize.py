"""Vector quantization of latents: nearest codes, the codebook's loss, its moving average.

From `VectorQuantizer2` and `EMAVectorQuantizer` of CompVis/taming-transformers, in float32 on any
platform. Axes: n codes, c channels of a code, p positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax import schema

CHUNK = 2048
"""Codes compared at a time: memory grows with it, not with the size of the codebook."""


class VectorQuantizer(nn.Module):
    """The codebook: latents [..., c] to (nearest codes [..., c], their indices, int32 [...]).

    Gradients pass to the latents unchanged, and do not reach the codebook: see `codebook_loss`.
    """

    num_codes: int
    embed_dim: int

    @nn.compact
    def __call__(self, z):
        def init(key, shape):
            return jax.random.uniform(key, shape, jnp.float32, -1 / shape[0], 1 / shape[0])

        codebook_nc = self.param("embedding", init, (self.num_codes, self.embed_dim))
        z = z.astype(jnp.float32)
        indices = nearest(codebook_nc, z)
        return straight_through(z, codebook_nc[indices]), indices


def nearest(codebook_nc: jax.Array, z: jax.Array) -> jax.Array:
    """Index of the nearest code of z [..., c], int32 [...]; of equally near ones, the first."""
    codebook_nc, z = (jax.lax.stop_gradient(a.astype(jnp.float32)) for a in (codebook_nc, z))
    z_pc = z.reshape(-1, z.shape[-1])
    chunk = min(CHUNK, len(codebook_nc))
    missing = -len(codebook_nc) % chunk
    # |z - e|^2 without |z|^2, which is the same for every code
    # (padding codes are infinitely far)
    norms_n = jnp.pad(jnp.sum(codebook_nc**2, -1), (0, missing), constant_values=jnp.inf)
    codebook_nc = jnp.pad(codebook_nc, ((0, missing), (0, 0)))
    chunks = (
        codebook_nc.reshape(-1, chunk, codebook_nc.shape[-1]),
        norms_n.reshape(-1, chunk),
        jnp.arange(0, len(norms_n), chunk),
    )

    def closer(best, some):
        distance_p, index_p = best
        codes_nc, norms_n, first = some
        # highest: in bfloat16 or TF32 passes, a TPU or GPU would choose other codes than a CPU
        products_pn = jnp.einsum("pc,nc->pn", z_pc, codes_nc, precision=jax.lax.Precision.HIGHEST)
        distance_pn = norms_n[None] - 2 * products_pn
        here_p = jnp.min(distance_pn, axis=-1)
        better = here_p < distance_p
        index_p = jnp.where(better, first + jnp.argmin(distance_pn, axis=-1), index_p)
        return (jnp.where(better, here_p, distance_p), index_p.astype(jnp.int32)), None

    start = jnp.full(len(z_pc), jnp.inf), jnp.zeros(len(z_pc), jnp.int32)
    (_, index_p), _ = jax.lax.scan(closer, start, chunks)
    return index_p.reshape(z.shape[:-1])


def straight_through(z: jax.Array, codes: jax.Array) -> jax.Array:
    """`codes` to the bit (z - z is 0), with the gradient of `z`."""
    return jax.lax.stop_gradient(codes) + (z - jax.lax.stop_gradient(z))


def codebook_loss(
    config: schema.AutoencoderVQConfig, codebook_nc: jax.Array, z: jax.Array, indices: jax.Array
) -> jax.Array:
    """Loss of every example, [B], averaged over it: latents z [B, ..., c] to their codes, and back.

    The commitment moves the encoder to the codes, the other term moves the codebook to the
    latents (van den Oord et al. 2017, eq. 3). `config.beta` weighs the commitment, and with
    `config.legacy` the codebook's term instead, as the reference does by mistake. A codebook with
    `config.codebook_decay` follows its average, and its term is left out.
    """
    codes, z = codebook_nc[indices], z.astype(jnp.float32)
    axes = tuple(range(1, z.ndim))
    commitment = jnp.mean(jnp.square(jax.lax.stop_gradient(codes) - z), axis=axes)
    follow = jnp.mean(jnp.square(codes - jax.lax.stop_gradient(z)), axis=axes)
    if config.codebook_decay is not None:
        return config.beta * commitment
    if config.legacy:
        return commitment + config.beta * follow
    return config.beta * commitment + follow


# --- codebook by moving average -----------------------------------------------------------------


class Assigned(NamedTuple):
    """Latents assigned to each code: count and sum, of a batch or averaged over many."""

    count_n: jax.Array
    sum_nc: jax.Array
    """Sum of the latents."""


def assigned(z: jax.Array, indices: jax.Array, num_codes: int) -> Assigned:
    """Counts and sums of the latents z [..., c] whose codes are `indices` [...]."""
    z_pc = jax.lax.stop_gradient(z.astype(jnp.float32)).reshape(-1, z.shape[-1])
    index_p = indices.reshape(-1)
    count_n = jax.ops.segment_sum(jnp.ones(len(index_p)), index_p, num_codes)
    return Assigned(count_n, jax.ops.segment_sum(z_pc, index_p, num_codes))


def start_averages(codebook_nc: jax.Array) -> Assigned:
    """Averages of a new codebook: every code has been assigned itself, once.

    The reference starts with a count of 0, which divides codes that the first batch does not use
    by the smoothing of 1e-5 alone, and moves them about 1e5 times as far out.
    """
    return Assigned(jnp.ones(len(codebook_nc)), codebook_nc.astype(jnp.float32))


def update_averages(averages: Assigned, batch: Assigned, decay: float) -> Assigned:
    """decay * averages + (1 - decay) * batch."""
    return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, averages, batch)


def codebook_from(averages: Assigned, epsilon: float = 1e-5) -> jax.Array:
    """The codebook [n, c]: means of the assigned latents, with Laplace smoothing of the counts."""
    count_n, sum_nc = averages
    total = jnp.sum(count_n)
    smooth_n = (count_n + epsilon) / (total + len(count_n) * epsilon) * total
    return sum_nc / smooth_n[:, None]


def usage(count_n: jax.Array) -> dict[str, jax.Array]:
    """`perplexity`, which is n if all codes are used alike, and `used_codes`, from counts [n]."""
    share_n = count_n / jnp.sum(count_n)
    return {
        "perplexity": jnp.exp(-jnp.sum(share_n * jnp.log(share_n + 1e-10))),
        "used_codes": jnp.sum(count_n > 0),
    }


# --- codes that nothing uses ---------------------------------------------------------------------


class Revived(NamedTuple):
    """A codebook after `revive`."""

    codebook_nc: jax.Array
    idle_n: jax.Array
    """Steps since each code was last taken or replaced."""
    replaced_n: jax.Array
    """Codes that are new: their moments in the optimizer, and their averages, are outdated."""


def idle_steps(idle_n: jax.Array, count_n: jax.Array) -> jax.Array:
    """Steps since each code was last taken, int32 [n], after a step that took them `count_n` times.

    A new codebook has idle_n = 0.
    """
    return jnp.where(count_n > 0, 0, idle_n + 1)


def revive(
    key: jax.Array, codebook_nc: jax.Array, idle_n: jax.Array, z: jax.Array, after: int
) -> Revived:
    """Codes idle for `after` steps or more move to latents of z [..., c], drawn without repeats.

    With fewer latents than such codes, the last ones stay as they are until a later step. The draw
    depends on `key` and z alone: every host and every mesh makes the same one.
    """
    z_pc = jax.lax.stop_gradient(jnp.asarray(z, jnp.float32)).reshape(-1, z.shape[-1])
    dead_n = idle_n >= after
    order_n = jnp.cumsum(dead_n) - 1
    replaced_n = dead_n & (order_n < len(z_pc))

    def moved() -> jax.Array:
        drawn_n = jax.random.permutation(key, len(z_pc))[jnp.where(replaced_n, order_n, 0)]
        return jnp.where(replaced_n[:, None], z_pc[drawn_n], codebook_nc)

    codebook_nc = jax.lax.cond(jnp.any(replaced_n), moved, lambda: codebook_nc)
    return Revived(codebook_nc, jnp.where(replaced_n, 0, idle_n), replaced_n)


def revive_averages(averages: Assigned, revived: Revived) -> Assigned:
    """The averages of a codebook that follows them: a new code has been assigned itself, once."""
    new_n = revived.replaced_n
    return Assigned(
        jnp.where(new_n, 1.0, averages.count_n),
        jnp.where(new_n[:, None], revived.codebook_nc, averages.sum_nc),
    )
