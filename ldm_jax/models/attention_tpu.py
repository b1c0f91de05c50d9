"""Fused attention for TPUs: logits stay on the chip, forward and backward (FlashAttention).

Logits are laid out as [keys, queries]: the softmax then reduces along sublanes, without moves
between lanes, and in the products with the values the width of a head is the row axis, which the
matrix unit pads to 8 only, where columns are padded to 128. Softmax is in float32. The heads stay
side by side in the channels, as the layers around have them.
Axes: b batch, q and k query and key positions, c channels (heads times d), n heads, d width of one.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
BLOCK = 512
"""Queries of a block."""
CHUNK = 256
"""Keys that are processed at a time."""
KEY_BYTES = 8 * 2**20
"""Most bytes of keys and values held on the chip at a time."""
VMEM_BYTES = 100 * 2**20
"""On-chip memory that the kernels may take; a v5e has 128 MiB."""
PRECISIONS = (None, "default", "highest", jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST)
"""Precisions of matrix products that the kernels have."""
LOG2_E = math.log2(math.e)
FAR = -1e30  # a logit whose weight is zero; finite, since the kernel subtracts peaks: no inf - inf


class Tiling(NamedTuple):
    """Blocks of queries and keys that one call of the kernel works on."""

    heads: int
    keys: int
    """Number of real keys; those after them are padding."""
    block_q: int
    block_k: int
    chunk: int
    """Keys of a block that are processed at a time; divides it."""
    precision: Any
    interpret: bool


def flash(q_bqc, k_bkc, v_bkc, heads: int, precision=None, interpret: bool = False):
    """softmax(q k^T / sqrt(d)) v of each head, [B, q, C]; C is `heads` times d.

    Takes any number of queries and keys; they are padded to the blocks. `precision` is one of
    PRECISIONS.
    """
    queries, keys, channels = q_bqc.shape[1], k_bkc.shape[1], q_bqc.shape[2]
    chunk = min(CHUNK, _up(keys, LANES))
    most = max(chunk, KEY_BYTES // (2 * _up(channels, LANES) * k_bkc.dtype.itemsize))
    block_k = _up(-(-keys // -(-keys // most)), chunk)
    block_q = min(BLOCK, _up(queries, LANES))
    tiling = Tiling(heads, keys, block_q, block_k, chunk, precision, interpret)
    q_bqc = _pad(q_bqc, block_q)
    k_bkc, v_bkc = _pad(k_bkc, block_k), _pad(v_bkc, block_k)
    return _attend(tiling, q_bqc, k_bkc, v_bkc)[:, :queries]


def _up(n: int, size: int) -> int:
    return -(-n // size) * size


def _pad(x_blc, size: int):
    return jnp.pad(x_blc, ((0, 0), (0, -x_blc.shape[1] % size), (0, 0)))


def _turn(x_blc):
    """Channels before positions; XLA gives the input this layout instead of transposing it."""
    return jnp.swapaxes(x_blc, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(tiling: Tiling, q_bqc, k_bkc, v_bkc):
    return _attend_forward(tiling, q_bqc, k_bkc, v_bkc)[0]


def _attend_forward(tiling, q_bqc, k_bkc, v_bkc):
    out_bcq, lse_bnq = _forward(tiling, _turn(q_bqc), k_bkc, _turn(v_bkc))
    return _turn(out_bcq), (q_bqc, k_bkc, v_bkc, out_bcq, lse_bnq)


def _attend_backward(tiling, kept, g_bqc):
    q_bqc, k_bkc, v_bkc, out_bcq, lse_bnq = kept
    turned = _turn(q_bqc), _turn(k_bkc), _turn(g_bqc)
    grads = _backward(tiling, *turned, k_bkc, v_bkc, out_bcq, lse_bnq)
    return tuple(map(_turn, grads))


_attend.defvjp(_attend_forward, _attend_backward)


def _dot(tiling: Tiling, a, b, contracted: tuple[int, int] = (1, 0)):
    dims = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(
        a, b, dims, precision=tiling.precision, preferred_element_type=jnp.float32
    )


def _call(tiling: Tiling, kernel: Callable, name: str, **call):
    """A kernel over (batch, blocks of one axis, blocks of the axis that is summed over)."""
    return pl.pallas_call(
        functools.partial(kernel, tiling),
        name=name,
        interpret=tiling.interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        **call,
    )


def _heads(tiling: Tiling, channels: int):
    """The channels of each head."""
    width = channels // tiling.heads
    return [slice(n * width, (n + 1) * width) for n in range(tiling.heads)]


def _logits(tiling: Tiling, k_kd, q_dq, first):
    """k q^T / log 2, so that exp2 gives the exponentials; padded keys get weight zero.

    first: position of the first key.
    """
    logits_kq = _dot(tiling, k_kd, q_dq) * (q_dq.shape[0] ** -0.5 * LOG2_E)
    if tiling.keys % tiling.block_k == 0:
        return logits_kq
    position = first + jax.lax.broadcasted_iota(jnp.int32, logits_kq.shape, 0)
    return jnp.where(position < tiling.keys, logits_kq, FAR)


# --- forward -------------------------------------------------------------------------------------


def _forward(tiling: Tiling, q_bcq, k_bkc, v_bck):
    """([B, C, q], base 2 logarithm of the sum of the exponentials: float32 [B, n, q])."""
    batch, channels, queries = q_bcq.shape
    q_spec = pl.BlockSpec((None, channels, tiling.block_q), lambda b, i, j: (b, 0, i))
    k_spec = pl.BlockSpec((None, tiling.block_k, channels), lambda b, i, j: (b, j, 0))
    v_spec = pl.BlockSpec((None, channels, tiling.block_k), lambda b, i, j: (b, 0, j))
    row_spec = pl.BlockSpec((None, tiling.heads, tiling.block_q), lambda b, i, j: (b, 0, i))
    rows = pltpu.VMEM((tiling.heads, tiling.block_q), jnp.float32)
    return _call(
        tiling,
        _forward_kernel,
        "flash_forward",
        out_shape=(
            jax.ShapeDtypeStruct(q_bcq.shape, q_bcq.dtype),
            jax.ShapeDtypeStruct((batch, tiling.heads, queries), jnp.float32),
        ),
        grid=(batch, queries // tiling.block_q, k_bkc.shape[1] // tiling.block_k),
        in_specs=[q_spec, k_spec, v_spec],
        out_specs=(q_spec, row_spec),
        scratch_shapes=[rows, rows, pltpu.VMEM((channels, tiling.block_q), jnp.float32)],
    )(q_bcq, k_bkc, v_bck)


def _forward_kernel(tiling, q_ref, k_ref, v_ref, out_ref, lse_ref, peak_ref, total_ref, sum_ref):
    """One block of queries and one of keys (online softmax): sums are rescaled as the peak
    grows."""
    heads, block = _heads(tiling, q_ref.shape[0]), pl.program_id(2)

    @pl.when(block == 0)
    def _():
        peak_ref[...] = jnp.full_like(peak_ref, FAR)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def chunk(i, _):
        keys = pl.ds(pl.multiple_of(i * tiling.chunk, tiling.chunk), tiling.chunk)
        first = block * tiling.block_k + i * tiling.chunk
        for n, head in enumerate(heads):
            row = slice(n, n + 1)
            logits_kq = _logits(tiling, k_ref[keys, head], q_ref[head], first)
            before_1q = peak_ref[row]
            peak_1q = jnp.maximum(before_1q, jnp.max(logits_kq, axis=0, keepdims=True))
            kept_1q = jnp.exp2(before_1q - peak_1q)
            weights_kq = jnp.exp2(logits_kq - peak_1q)
            total_1q = jnp.sum(weights_kq, axis=0, keepdims=True)
            peak_ref[row] = peak_1q
            total_ref[row] = kept_1q * total_ref[row] + total_1q
            new_dq = _dot(tiling, v_ref[head, keys], weights_kq.astype(v_ref.dtype))
            sum_ref[head] = kept_1q * sum_ref[head] + new_dq

    jax.lax.fori_loop(0, tiling.block_k // tiling.chunk, chunk, None)

    @pl.when(block == pl.num_programs(2) - 1)
    def _():
        for n, head in enumerate(heads):
            out_ref[head] = (sum_ref[head] / total_ref[n : n + 1]).astype(out_ref.dtype)
        lse_ref[...] = peak_ref[...] + jnp.log2(total_ref[...])


# --- backward ------------------------------------------------------------------------------------


def _backward(tiling: Tiling, q_bcq, k_bck, g_bcq, k_bkc, v_bkc, out_bcq, lse_bnq):
    """Gradients of queries, keys and values, [B, C, q] and [B, C, k]."""
    batch, channels, queries = q_bcq.shape
    blocks_k = k_bkc.shape[1] // tiling.block_k
    q_spec = pl.BlockSpec((None, channels, tiling.block_q), lambda b, j, i: (b, 0, i))
    k_spec = pl.BlockSpec((None, tiling.block_k, channels), lambda b, j, i: (b, j, 0))
    kt_spec = pl.BlockSpec((None, channels, tiling.block_k), lambda b, j, i: (b, 0, j))
    row_spec = pl.BlockSpec((None, tiling.heads, tiling.block_q), lambda b, j, i: (b, 0, i))
    part_spec = pl.BlockSpec((None, None, channels, tiling.block_q), lambda b, j, i: (j, b, 0, i))
    # each block of keys gives a part of dq; several of them are summed below, in float32
    part = q_bcq.dtype if blocks_k == 1 else jnp.float32
    dq_jbcq, dk_bck, dv_bck = _call(
        tiling,
        _backward_kernel,
        "flash_backward",
        out_shape=(
            jax.ShapeDtypeStruct((blocks_k, *q_bcq.shape), part),
            jax.ShapeDtypeStruct(k_bck.shape, k_bck.dtype),
            jax.ShapeDtypeStruct(k_bck.shape, v_bkc.dtype),
        ),
        grid=(batch, blocks_k, queries // tiling.block_q),
        in_specs=[q_spec, kt_spec, q_spec, k_spec, k_spec, q_spec, row_spec],
        out_specs=(part_spec, kt_spec, kt_spec),
        scratch_shapes=[
            pltpu.VMEM((tiling.heads, tiling.block_q), jnp.float32),
            pltpu.VMEM((channels, tiling.block_q), jnp.float32),
            pltpu.VMEM((channels, tiling.block_k), jnp.float32),
            pltpu.VMEM((channels, tiling.block_k), jnp.float32),
        ],
    )(q_bcq, k_bck, g_bcq, k_bkc, v_bkc, out_bcq, lse_bnq)
    return jnp.sum(dq_jbcq, axis=0, dtype=jnp.float32).astype(q_bcq.dtype), dk_bck, dv_bck


def _backward_kernel(tiling, q_ref, kt_ref, g_ref, k_ref, v_ref, out_ref, lse_ref, *results):
    """One block of keys and one of queries; the weights are recomputed from `lse_ref`."""
    dq_ref, dk_ref, dv_ref, inner_ref, dq_sum, dk_sum, dv_sum = results
    heads, block = _heads(tiling, q_ref.shape[0]), pl.program_id(1)
    scale = (q_ref.shape[0] // tiling.heads) ** -0.5

    @pl.when(pl.program_id(2) == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    dq_sum[...] = jnp.zeros_like(dq_sum)
    # dlogits = weights (dweights - sum over keys of weights dweights), and that sum is out . g,
    # which needs no pass over all keys (Dao et al. 2022, FlashAttention, appendix B)
    for n, head in enumerate(heads):
        product_dq = out_ref[head].astype(jnp.float32) * g_ref[head].astype(jnp.float32)
        inner_ref[n : n + 1] = jnp.sum(product_dq, axis=0, keepdims=True)

    def chunk(i, _):
        keys = pl.ds(pl.multiple_of(i * tiling.chunk, tiling.chunk), tiling.chunk)
        first = block * tiling.block_k + i * tiling.chunk
        for n, head in enumerate(heads):
            row, q_dq, g_dq = slice(n, n + 1), q_ref[head], g_ref[head]
            logits_kq = _logits(tiling, k_ref[keys, head], q_dq, first)
            weights_kq = jnp.exp2(logits_kq - lse_ref[row])
            dv_sum[head, keys] += _dot(tiling, g_dq, weights_kq.astype(g_dq.dtype), (1, 1))
            dweights_kq = _dot(tiling, v_ref[keys, head], g_dq)
            dlogits_kq = weights_kq * (dweights_kq - inner_ref[row]) * scale
            dlogits_kq = dlogits_kq.astype(q_dq.dtype)
            dk_sum[head, keys] += _dot(tiling, q_dq, dlogits_kq, (1, 1))
            dq_sum[head] += _dot(tiling, kt_ref[head, keys], dlogits_kq)

    jax.lax.fori_loop(0, tiling.block_k // tiling.chunk, chunk, None)
    dq_ref[...] = dq_sum[...].astype(dq_ref.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dk_ref[...] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)
