"""Attention as one function, chosen for the target devices and passed to the modules.

Every attention here is `f(q_bqnd, k_bknd, v_bknd, precision=None) -> out_bqnd`, which is
softmax(q k^T / sqrt(d)) v without masks, softmax in float32.
Axes: b batch, q and k query and key positions, n heads, d width of a head, c chunks,
x heads of all images.
"""

import functools
from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jax.sharding import Mesh, PartitionSpec

from ldm_jax.models import attention_tpu

AttentionFunction = Callable[..., jax.Array]

NAMES = ("auto", "xla", "chunked", "cudnn", "flash")
CHUNK_LOGITS = 2**21
"""Logits that `chunked` and `grouped` hold at a time: 8 MiB, about a CPU's cache."""
CPU_LOGITS = 2**18
"""Logits of one head from which on `cpu` takes `chunked`: measured, forward and backward."""
FLASH_LOGITS = 2**18
"""Logits of one head from which on `flash` takes the kernel: estimated (`tpu_cost`)."""


def xla(q_bqnd, k_bknd, v_bknd, precision: PrecisionLike = None):
    """The plain formula, all logits at once."""
    # float32: at 64 the next number that bfloat16 knows is 64.5, and softmax takes the exponential
    logits_bnqk = jnp.einsum(
        "bqnd,bknd->bnqk", q_bqnd, k_bknd, precision=precision, preferred_element_type=jnp.float32
    )
    weights_bnqk = jax.nn.softmax(logits_bnqk * q_bqnd.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum(
        "bnqk,bknd->bqnd", weights_bnqk.astype(v_bknd.dtype), v_bknd, precision=precision
    )


def chunked(q_bqnd, k_bknd, v_bknd, precision: PrecisionLike = None):
    """One head and one chunk of queries at a time, recomputed in the backward pass.

    Logits stay in a CPU's cache, and memory grows linearly with the number of tokens.
    """
    batch, queries = q_bqnd.shape[:2]
    most = max(1, CHUNK_LOGITS // k_bknd.shape[1])
    chunk = -(-queries // -(-queries // most))  # equal chunks, so that little is padding
    q_bqnd = jnp.pad(q_bqnd, ((0, 0), (0, -queries % chunk), (0, 0), (0, 0)))
    q_xcqd = einops.rearrange(q_bqnd, "b (c q) n d -> (b n) c q d", q=chunk)
    k_xkd = einops.rearrange(k_bknd, "b k n d -> (b n) k d")
    v_xkd = einops.rearrange(v_bknd, "b k n d -> (b n) k d")

    def head(qkv):
        q_cqd, k_kd, v_kd = qkv
        return jax.lax.map(lambda q_qd: _attend(precision, q_qd, k_kd, v_kd), q_cqd)

    out_xcqd = jax.lax.map(head, (q_xcqd, k_xkd, v_xkd))
    return einops.rearrange(out_xcqd, "(b n) c q d -> b (c q) n d", b=batch)[:, :queries]


def grouped(q_bqnd, k_bknd, v_bknd, precision: PrecisionLike = None):
    """Some heads at a time, of one image or several, recomputed in the backward pass.

    `chunked` for heads of few logits: a loop over each of them costs more than their operations.
    """
    batch, queries = q_bqnd.shape[:2]
    most = max(1, CHUNK_LOGITS // (queries * k_bknd.shape[1]))
    qkv = tuple(einops.rearrange(a, "b l n d -> (b n) l d") for a in (q_bqnd, k_bknd, v_bknd))
    out_xqd = jax.lax.map(lambda head: _attend(precision, *head), qkv, batch_size=most)
    return einops.rearrange(out_xqd, "(b n) q d -> b q n d", b=batch)


@functools.partial(jax.checkpoint, static_argnums=0)
def _attend(precision, q_qd, k_kd, v_kd):
    """Attention of one head.

    The division by the sum comes last, so that XLA fuses logits to exponentials into one op on
    CPUs.
    """
    logits_qk = jnp.einsum(
        "qd,kd->qk", q_qd, k_kd, precision=precision, preferred_element_type=jnp.float32
    )
    logits_qk *= q_qd.shape[-1] ** -0.5
    # softmax is invariant to the peak: its gradient is zero, and computing it would cost an argmax
    peak_q1 = jax.lax.stop_gradient(jnp.max(logits_qk, axis=-1, keepdims=True))
    weights_qk = jnp.exp(logits_qk - peak_q1)
    total_q1 = jnp.sum(weights_qk, axis=-1, keepdims=True)
    sum_qd = jnp.einsum(
        "qk,kd->qd",
        weights_qk.astype(v_kd.dtype),
        v_kd,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return (sum_qd / total_q1).astype(v_kd.dtype)


def cudnn(q_bqnd, k_bknd, v_bknd, precision: PrecisionLike = None):
    """cuDNN's fused attention where it applies, else `xla`.

    It applies to bfloat16 and float16 and head widths 8 to 128 in steps of 8. Odd lengths are
    padded by one position, which is masked.
    """
    width = q_bqnd.shape[-1]
    if q_bqnd.dtype not in (jnp.bfloat16, jnp.float16) or width % 8 or width > 128:
        return xla(q_bqnd, k_bknd, v_bknd, precision)
    batch, queries, keys = q_bqnd.shape[0], q_bqnd.shape[1], k_bknd.shape[1]
    lengths = {}  # none where nothing is padded: masks cost time
    if queries % 2 or keys % 2:
        lengths = {
            "query_seq_lengths": jnp.full((batch,), queries, jnp.int32),
            "key_value_seq_lengths": jnp.full((batch,), keys, jnp.int32),
        }
    q_bqnd, k_bknd, v_bknd = (
        jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q_bqnd, k_bknd, v_bknd)
    )
    out_bqnd = jax.nn.dot_product_attention(
        q_bqnd, k_bknd, v_bknd, implementation="cudnn", **lengths
    )
    return out_bqnd[:, :queries]


def flash(q_bqnd, k_bknd, v_bknd, precision: PrecisionLike = None):
    """The kernel of `attention_tpu` for long sequences, `xla` for short ones.

    Also `xla` for heads whose width is no multiple of 8 (the height of a TPU tile), and for a
    precision that the kernel's matrix products lack: "high", or a pair.
    """
    heads, width = q_bqnd.shape[2:]
    short = q_bqnd.shape[1] * k_bknd.shape[1] < FLASH_LOGITS
    if short or width % 8 or precision not in attention_tpu.PRECISIONS:
        return xla(q_bqnd, k_bknd, v_bknd, precision)
    merged = (einops.rearrange(a, "b l n d -> b l (n d)") for a in (q_bqnd, k_bknd, v_bknd))
    out_bqc = attention_tpu.flash(*merged, heads, precision)
    return einops.rearrange(out_bqc, "b q (n d) -> b q n d", n=heads)


def cpu(q_bqnd, k_bknd, v_bknd, precision: PrecisionLike = None):
    """`chunked` for long sequences, `grouped` for short ones."""
    long = q_bqnd.shape[1] * k_bknd.shape[1] >= CPU_LOGITS
    return (chunked if long else grouped)(q_bqnd, k_bknd, v_bknd, precision)


@functools.lru_cache
def choose(platform: str, mesh: Mesh | None = None, name: str = "auto") -> AttentionFunction:
    """The attention for modules that will run on `platform`: cpu, gpu, cuda, rocm or tpu.

    `platform` is that of the target devices, which is not where a program is traced when it is
    compiled ahead of time. "auto" is `cpu` there, `cudnn` on CUDA GPUs, `flash` on TPUs and `xla`
    elsewhere. Kernels that XLA cannot partition are split over the batch and the heads with the
    axes `data`, `fsdp` and `tensor` of `mesh`, and over the queries with `space`. Equal arguments
    give the same function, so modules that hold it compare equal.

    Raises ValueError for an unknown name, for "cudnn" on anything but a GPU, and for "flash" on
    anything but a TPU.
    """
    if name not in NAMES:
        raise ValueError(f"attention {name!r} is unknown; choose one of {', '.join(NAMES)}")
    if name == "cudnn" and platform not in ("gpu", "cuda"):
        raise ValueError(f"attention 'cudnn' does not run on {platform!r}; use 'auto' there")
    if name == "flash" and platform != "tpu":
        raise ValueError(f"attention 'flash' does not run on {platform!r}; use 'auto' there")
    automatic = {"cpu": cpu, "gpu": cudnn, "cuda": cudnn, "tpu": flash}.get(platform, xla)
    functions = (automatic, xla, chunked, cudnn, flash)
    function = dict(zip(NAMES, functions, strict=True))[name]
    if function is xla or mesh is None or mesh.size == 1:
        return function
    return functools.partial(_split, function, mesh)


def _split(function, mesh, q_bqnd, k_bknd, v_bknd, precision=None):
    """`function` on each device's examples, heads and queries; an axis that does not divide them is
    left out, and so is one that the caller has split by hand."""
    context = jax.sharding.get_abstract_mesh()
    free = [axis for axis in mesh.axis_names if axis not in context.manual_axes]
    batch, _, heads, _ = q_bqnd.shape
    batch_axes: tuple[str, ...] = ()
    for axis in ("data", "fsdp"):  # in the order of `sharding.batch_sharding`: rows stay in place
        if axis in free and batch % mesh.shape[axis] == 0:
            batch_axes, batch = (*batch_axes, axis), batch // mesh.shape[axis]
    head_axis = "tensor" if "tensor" in free and heads % mesh.shape["tensor"] == 0 else None
    space = "space" in free and q_bqnd.shape[1] % mesh.shape["space"] == 0
    spec = PartitionSpec(batch_axes or None, None, head_axis, None)
    q_spec = PartitionSpec(batch_axes or None, "space" if space else None, head_axis, None)
    split = jax.shard_map(
        functools.partial(function, precision=precision),
        mesh=context if context.manual_axes else mesh,
        in_specs=(q_spec, spec, spec),
        out_specs=q_spec,
        axis_names=set(free),
        check_vma=False,
    )
    return split(q_bqnd, k_bknd, v_bknd)
