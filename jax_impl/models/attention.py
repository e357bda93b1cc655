"""Self-attention from matmul and softmax: the form through which a tangent passes."""

import jax
import jax.numpy as jnp
from flax import nnx

from jax_impl.models.layers import linear


class Attention(nnx.Module):
    """Multi-head self-attention over tokens x [b n d]; fused qkv laid out as (3, heads, d/heads)."""

    def __init__(self, width, num_heads, *, dtype, rngs):
        self.num_heads = num_heads
        self.qkv = linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        batch, tokens, width = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1), (2, 3), (0, 2))
        x = attend(q, k, v)
        return self.proj(x.swapaxes(1, 2).reshape(batch, tokens, width))


def attend(q, k, v):
    """Return softmax(q k^T / sqrt(d)) v for q, k, v [b heads n d]; the softmax in float32 at least."""
    scores = (q * q.shape[-1] ** -0.5) @ k.swapaxes(-1, -2)
    weights = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), axis=-1)
    return weights.astype(v.dtype) @ v
