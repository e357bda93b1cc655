"""Self-attention, by matmul and softmax, which support forward-mode AD, or by a fused kernel."""

import jax
import jax.numpy as jnp
from flax import nnx

from jax_impl.devices import platform
from jax_impl.models.layers import Linear, rms_norm
from jax_impl.models.tape import under_jvp
from meanflow.errors import UserError


class HeadNorm(nnx.Module):
    """RMS-normalise the channels of each head and scale them; in float32 at least."""

    def __init__(self, dim):
        self.scale = nnx.Param(jnp.zeros(dim))

    def __call__(self, x):
        return rms_norm(x) * self.scale


class Attention(nnx.Module):
    """Multi-head self-attention over tokens x [b n d]; fused qkv laid out as (3, heads, d/heads).

    kernels: (normal, under JVP), names from `KERNELS`.  qk_norm: RMS-normalise queries and keys per head.
    """

    def __init__(self, width, num_heads, *, qk_norm=False, kernels=("plain", "plain"), dtype):
        self.num_heads, self.qk_norm, self.kernels = num_heads, qk_norm, kernels
        self.qkv = Linear(width, 3 * width, dtype=dtype)
        if qk_norm:
            self.q_norm = HeadNorm(width // num_heads)
            self.k_norm = HeadNorm(width // num_heads)
        self.proj = Linear(width, width, dtype=dtype)

    def __call__(self, x, tape=None):
        batch, tokens, width = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x, tape).reshape(batch, tokens, 3, self.num_heads, -1), (2, 3), (0, 2))
        if self.qk_norm:
            q, k = self.q_norm(q).astype(v.dtype), self.k_norm(k).astype(v.dtype)
        x = attend(q, k, v, self.kernels[int(under_jvp(tape))])
        return self.proj(x.swapaxes(1, 2).reshape(batch, tokens, width), tape)


def attend(q, k, v, kernel="plain"):
    """Return softmax(q k^T / sqrt(d)) v for q, k, v [b heads n d], by a kernel of `KERNELS`."""
    return KERNELS[kernel](q, k, v)


def plain(q, k, v):
    """Attend by matmul and softmax, the softmax in float32 at least; supports every derivative."""
    scores = (q * q.shape[-1] ** -0.5) @ k.swapaxes(-1, -2)
    weights = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), axis=-1)
    return weights.astype(v.dtype) @ v


def fused(q, k, v):
    """Attend by cuDNN's fused kernel, which supports gradients but no JVP.

    In a program for a GPU, see `has_kernel`; in others XLA compiles the plain form, with its softmax in float32.
    """
    kernel = "cudnn" if platform() == "gpu" and has_kernel(v) else "xla"
    # Not `jax.lax.platform_dependent`: the gradient of one kernel would also keep what the other needs, as zeros.
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, implementation=kernel).swapaxes(1, 2)


def has_kernel(v):
    """Return whether cuDNN attends to values [b heads n d] of this shape and dtype, which JAX refuses otherwise.

    Source: jax, jax/_src/cudnn/fused_attention_stablehlo.py, check_is_flash_attention.
    """
    *_, tokens, dim = v.shape
    return jnp.dtype(v.dtype).itemsize == 2 and tokens % 2 == 0 and dim % 8 == 0 and dim <= 128


KERNELS = {"plain": plain, "fused": fused}


def check_kernels(c):
    """Raise UserError if `config.model` names a JVP kernel that JAX does not have."""
    if "attention_jvp" in c and c.attention_jvp not in KERNELS:  # U-Nets have one attention for all
        raise UserError(
            f"config.model.attention_jvp is {c.attention_jvp}, a kernel that PyTorch alone has: set "
            "--config.model.attention_jvp=plain, or train in PyTorch"
        )
