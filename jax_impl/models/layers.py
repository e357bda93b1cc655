"""Layers that several networks share: norms, embeddings of time, label and position.

Parameters are made of zeros, for `meanflow.weights.initial` or loaded weights to replace, and kept in
`param_dtype`; matmuls run in `dtype`; time features and norms in at least float32.
Attribute names are those of the official PyTorch checkpoints, so a parameter's path is its canonical name except for
the leaf (`kernel` here is `weight` there, transposed).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_impl.models.tape import affine

zeros = nnx.initializers.zeros_init()


class Linear(nnx.Linear):
    """An affine layer computed in `dtype` (None: the input's) from float32 parameters."""

    name = None  # see `name_layers`

    def __init__(self, in_features, out_features, *, dtype, bias=True):
        super().__init__(
            in_features,
            out_features,
            use_bias=bias,
            dtype=dtype,
            kernel_init=zeros,
            bias_init=zeros,
            rngs=nnx.Rngs(0),
        )

    def __call__(self, x, tape=None):  # pyright: ignore
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((x, self.kernel[...], bias), dtype=self.dtype)
        y = affine(matmul, x, kernel, self.name, tape)
        return y if bias is None else y + bias


def matmul(x, kernel):
    """Return x [... in] times kernel [in out] as one product of two matrices.

    On a CPU the gradient of a higher-rank product first transposes whole arrays: 1.15 times the step of DiT-S/4.
    """
    y = x.reshape(-1, x.shape[-1]) @ kernel
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def convolve(x, kernel, *, padding, strides=(1, 1)):
    """Return the convolution of x [b h w in] with a kernel [k k in out]."""
    return jax.lax.conv_general_dilated(
        x, kernel, strides, [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def layer_norm(x, eps=1e-6):
    """Normalise the last axis to mean 0 and variance 1, without scale and shift; float32 statistics at least."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


def rms_norm(x, eps=1e-6):
    """Divide the last axis by its root mean square; in float32 at least."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


def modulate(x, shift, scale):
    """Shift and scale the tokens x [b n d] by vectors [b d]: x (1 + scale) + shift."""
    return x * (1 + scale[:, None]) + shift[:, None]


def timestep_features(t, dim=256, max_period=10_000.0):
    """Return sinusoidal features [b dim] of times t [b] in [0, 1]: cosines first, then sines.

    Frequencies exp(-ln(max_period) i / (dim/2)), i < dim/2; t is not multiplied by 1000.
    Source: Gsunshine/meanflow, models/models_dit.py, TimestepEmbedder.
    """
    t = t.astype(jnp.promote_types(t.dtype, jnp.float32))
    frequencies = np.exp(-math.log(max_period) * np.arange(dim // 2) / (dim // 2))
    angles = t[:, None] * jnp.asarray(frequencies, t.dtype)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedder(nnx.Module):
    """Embed times [b] into vectors [b width]: sinusoidal features, then a two-layer MLP in float32."""

    def __init__(self, width, *, features=256):
        self.features = features
        self.mlp = nnx.Dict(
            {
                "0": Linear(features, width, dtype=None),
                "2": Linear(width, width, dtype=None),
            }
        )

    def __call__(self, t, tape=None):
        x = timestep_features(t, self.features)
        x = nnx.silu(self.mlp["0"](x, tape))
        return self.mlp["2"](x, tape)


def embedding(num, width):
    """Return a table of `num` vectors of this width."""
    return nnx.Embed(num, width, embedding_init=zeros, rngs=nnx.Rngs(0))


class LabelEmbedder(nnx.Module):
    """Embed labels [b] in [0, num_classes] into vectors [b width]; the last row is the null class."""

    def __init__(self, num_classes, width):
        self.embedding_table = embedding(num_classes + 1, width)

    def __call__(self, y):
        return self.embedding_table.embedding[y]  # nnx.Embed would cast to float32


class PatchEmbed(nnx.Module):
    """Cut images [b h w c] into patches and map each to a token [b n width]."""

    name = None  # see `name_layers`

    def __init__(self, patch_size, channels, width, *, dtype):
        window = (patch_size, patch_size)
        options = {"kernel_init": zeros, "bias_init": zeros, "rngs": nnx.Rngs(0)}
        self.proj = nnx.Conv(channels, width, window, window, **options)
        self.dtype = dtype

    def __call__(self, x, tape=None):
        x, kernel, bias = (a.astype(self.dtype) for a in (x, self.proj.kernel[...], self.proj.bias[...]))  # pyright: ignore
        x = affine(functools.partial(convolve, padding=0, strides=self.proj.strides), x, kernel, self.name, tape) + bias
        return x.reshape(x.shape[0], -1, x.shape[-1])


def unpatchify(x, channels):
    """Reassemble tokens [b n p*p*c], channel fastest, into images [b h w c]."""
    batch, tokens, features = x.shape
    grid, patch = math.isqrt(tokens), math.isqrt(features // channels)
    x = x.reshape(batch, grid, grid, patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, grid * patch, grid * patch, channels)
