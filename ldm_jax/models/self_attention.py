"""Self-attention of the text and image encoders, over all tokens or over the earlier ones.

Axes: b batch, l tokens, q and k query and key positions, n heads, d width of a head, c channels.
"""

from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.lax import PrecisionLike

Make = Callable[..., nn.Module]


def attend(q_bqnd, k_bknd, v_bknd, *, causal: bool, precision: PrecisionLike = None):
    """softmax(q k^T / sqrt(d)) v, softmax in float32; `causal`: no query sees a later key."""
    logits_bnqk = jnp.einsum(
        "bqnd,bknd->bnqk", q_bqnd, k_bknd, precision=precision, preferred_element_type=jnp.float32
    )
    logits_bnqk *= q_bqnd.shape[-1] ** -0.5
    if causal:
        seen_qk = jnp.tri(q_bqnd.shape[1], k_bknd.shape[1], dtype=bool)
        logits_bnqk = jnp.where(seen_qk[None, None], logits_bnqk, -jnp.inf)
    weights_bnqk = jax.nn.softmax(logits_bnqk, axis=-1).astype(v_bknd.dtype)
    return jnp.einsum("bnqk,bknd->bqnd", weights_bnqk, v_bknd, precision=precision)


class SelfAttention(nn.Module):
    """[B, L, C] -> [B, L, C]; the heads together may be wider or narrower than C."""

    num_heads: int
    head_width: int
    project: Make
    """(channels, name=...) -> the dense layer of queries, keys or values."""
    project_out: Make
    causal: bool = False
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x_blc: jax.Array) -> jax.Array:
        def heads(name):
            a_blc = self.project(self.num_heads * self.head_width, name=name)(x_blc)
            return einops.rearrange(a_blc, "b l (n d) -> b l n d", n=self.num_heads)

        qkv = (heads(f"{part}_proj") for part in "qkv")
        out_blnd = attend(*qkv, causal=self.causal, precision=self.precision)
        out_blc = einops.rearrange(out_blnd, "b l n d -> b l (n d)")
        return self.project_out(x_blc.shape[-1], name="out_proj")(out_blc)


def layer_norm(name: str, dtype) -> nn.LayerNorm:
    """LayerNorm with PyTorch's epsilon, computed in float32."""
    return nn.LayerNorm(1e-5, use_fast_variance=False, dtype=dtype, name=name)


def check_length(ids_bl: jax.Array, max_length: int) -> None:
    """ValueError for more tokens than there are positions."""
    if ids_bl.shape[1] > max_length:
        raise ValueError(
            f"{ids_bl.shape[1]} tokens are more than the {max_length} the text encoder has"
            " positions for: truncate them"
        )
