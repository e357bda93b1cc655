"""Self-attention, by matmul and softmax, which support forward-mode AD, or by a fused kernel."""

import torch
import torch.nn.functional as F
from torch import nn

from torch_impl.models.flash import check_flash, flash
from torch_impl.models.layers import Linear, rms_norm
from torch_impl.models.tape import under_jvp


class HeadNorm(nn.Module):
    """RMS-normalise the channels of each head and scale them; in float32 at least."""

    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return rms_norm(x) * self.scale


class Attention(nn.Module):
    """Multi-head self-attention over tokens x [b n d]; fused qkv laid out as (3, heads, d/heads).

    kernels: (normal, under JVP), names from `KERNELS`.  qk_norm: RMS-normalise queries and keys per head.
    """

    def __init__(self, width, num_heads, *, qk_norm=False, kernels=("plain", "plain"), dtype):
        super().__init__()
        self.num_heads, self.qk_norm, self.kernels = num_heads, qk_norm, kernels
        self.qkv = Linear(width, 3 * width, dtype=dtype)
        if qk_norm:
            self.q_norm = HeadNorm(width // num_heads)
            self.k_norm = HeadNorm(width // num_heads)
        self.proj = Linear(width, width, dtype=dtype)

    def forward(self, x, tape=None):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x, tape).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if self.qk_norm:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        x = attend(q, k, v, self.kernels[int(under_jvp(tape))])  # torch 2.11 compiles no bool index
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width), tape)


def attend(q, k, v, kernel="plain"):
    """Return softmax(q k^T / sqrt(d)) v for q, k, v [b heads n d], by a kernel of `KERNELS`."""
    return KERNELS[kernel](q, k, v)


def plain(q, k, v):
    """Attend by matmul and softmax, the softmax in float32 at least; supports every derivative."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    weights = torch.softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), dim=-1)
    return weights.to(v.dtype) @ v


def fused(q, k, v):
    """Attend by PyTorch's fused kernel, the best for the device; it supports gradients but no JVP."""
    return F.scaled_dot_product_attention(q, k, v)


KERNELS = {"plain": plain, "fused": fused, "flash": flash}


def check_kernels(c, device):
    """Raise UserError if `config.model` names a JVP kernel that is not installed or does not run on `device`."""
    if "attention_jvp" in c and c.attention_jvp == "flash":  # U-Nets have one attention for all
        check_flash(device)
