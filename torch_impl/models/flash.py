"""Attention and its JVP in one fused kernel, from the package jvp_flash_attention: PyTorch on CUDA only.

Version 0.14.0 needs block pointers, which Triton 3.6 has and 3.9 has removed.
"""

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from meanflow.errors import UserError

# The package also accepts 16 channels per head, but its kernel needs key blocks no longer than a head is wide.
WIDTHS = (32, 64, 128, 256)
# Tokens per block.  The kernel reads and writes whole blocks and ignores the end of a sequence: for other even lengths,
# which the package accepts, it mixes neighbouring sequences.
BLOCK = 32


def check_flash(device):
    """Raise UserError if the package is not installed or its kernel does not run on `device`."""
    load()
    if device.type != "cuda":
        raise UserError(
            f"config.model.attention_jvp is flash, whose kernel needs a CUDA device, and this runs on the "
            f"{device.type}: set --config.model.attention_jvp=plain"
        )


def load():
    """Return the package's JVPAttn.  Raises UserError if it, or what it needs, is not installed."""
    try:
        from jvp_flash_attention import jvp_attention  # optional  # pyright: ignore
    except ModuleNotFoundError as error:
        raise UserError(
            f"config.model.attention_jvp is flash, which needs the package {error.name}, which is not installed: "
            'pip install --constraint constraints.txt -e ".[flash]", or set --config.model.attention_jvp=plain'
        ) from error
    return jvp_attention.JVPAttn


def flash(q, k, v):
    """Return softmax(q k^T / sqrt(d)) v for q, k, v [b heads n d], d <= 256, and its tangent, inside torch.func.jvp.

    For bfloat16, float16, or float32, whose products are TF32.  Gradients are not supported: asking for one is an
    error.  Widths and lengths that the kernel does not take are padded with zeros.
    """
    tokens, dim = q.shape[2:]
    padding = (0, min(w for w in WIDTHS if w >= dim) - dim, 0, -tokens % BLOCK)
    values, tangents = zip(*(forward_ad.unpack_dual(a) for a in (q, k, v)), strict=True)
    tangents = [torch.zeros_like(a) if t is None else t for a, t in zip(values, tangents, strict=True)]
    padded = [F.pad(a, padding) for a in (*values, *tangents)]
    value, tangent = (a[:, :, :tokens, :dim] for a in launch(*padded, tokens, dim**-0.5))
    return forward_ad.make_dual(value, tangent)


@torch.library.custom_op("meanflow::flash", mutates_args=())
def launch(
    q: Tensor, k: Tensor, v: Tensor, q_t: Tensor, k_t: Tensor, v_t: Tensor, tokens: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return softmax(scale q k^T) v over the first `tokens` keys, and its tangent: [b heads n d], as all are.

    Opaque to torch.compile, because the package sets Triton's allocator, which not every version of PyTorch can trace.
    JVPAttn.fwd_dual, the package's entry for duals, calls the same function.
    """
    batch, heads, length, _ = q.shape
    mask = None
    if length > tokens:  # one byte for each score
        mask = (torch.arange(length, device=q.device) < tokens).expand(batch, heads, length, length)
    q, k, v, q_t, k_t, v_t = (a.contiguous() for a in (q, k, v, q_t, k_t, v_t))  # it uses q's strides for all
    # Verifying a mask would wait for the device.
    value, (tangent, *_) = load().forward(
        q, k, v, q_t, k_t, v_t, attn_mask=mask, sm_scale=scale, USE_TMA=False, verify_attn_mask=False
    )
    return value, tangent


@launch.register_fake
def _(q, k, v, q_t, k_t, v_t, tokens, scale):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(q.shape, dtype=q.dtype, device=q.device)
