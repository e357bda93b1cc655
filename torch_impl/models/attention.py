"""Self-attention from matmul and softmax: the form through which a tangent passes."""

import torch
from torch import nn

from torch_impl.models.layers import Linear


class Attention(nn.Module):
    """Multi-head self-attention over tokens x [b n d]; fused qkv laid out as (3, heads, d/heads)."""

    def __init__(self, width, num_heads, *, dtype):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width, dtype=dtype)
        self.proj = Linear(width, width, dtype=dtype)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = attend(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


def attend(q, k, v):
    """Return softmax(q k^T / sqrt(d)) v for q, k, v [b heads n d]; the softmax in float32 at least."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    weights = torch.softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), dim=-1)
    return weights.to(v.dtype) @ v
