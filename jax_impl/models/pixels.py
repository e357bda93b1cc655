"""Layers over pixels, for the U-Net and the autoencoder: norm, convolution with resampling, attention, dropout."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_impl.models.layers import convolve
from jax_impl.models.tape import affine
from meanflow.tables import resample_matrix

EPS = 1e-6  # of all group norms


def positional_features(t, dim, max_period=10_000.0):
    """Return sinusoidal features [b dim] of times t [b]: cosines first, then sines, frequencies from 1 to 1/max_period.

    Source: NVlabs/edm, training/networks.py, PositionalEmbedding with its endpoint.
    """
    t = t.astype(jnp.promote_types(t.dtype, jnp.float32))
    frequencies = (1 / max_period) ** (np.arange(dim // 2) / (dim // 2 - 1))
    angles = t[:, None] * jnp.asarray(frequencies, t.dtype)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def hash32(x):
    """Hash uint32 integers into random-looking ones, one to one.

    Source: the `lowbias32` function of Chris Wellons' hash-prospector, after an offset.
    """
    x = x + np.uint32(0x9E3779B9)
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def keep_masks(draws, num_entries, prob):
    """Return which of `num_entries` entries dropout keeps, [b n] bool, each kept with probability 1 - prob.

    draws: [b] uniforms in [0, 1).  A mask is a function of (row's draw, entry) in exact integer arithmetic: the same in
    both frameworks, on any number of devices and in any number of micro-batches.
    """
    seeds = hash32(jnp.floor(draws * 2**24).astype(jnp.uint32))
    places = hash32(jnp.arange(num_entries, dtype=jnp.uint32))
    return hash32(places[None] ^ seeds[:, None]) >= np.uint32(round(prob * 2**32))


def dropout(x, prob, keep):
    """Set entries of x [b h w c] to zero where not `keep` [b h*w*c] and scale the others by 1 / (1 - prob)."""
    return jnp.where(keep.reshape(x.shape), x / (1 - prob), 0)


class FourierFeatures(nnx.Module):
    """Features [b dim] of times t [b] at random frequencies: cosines, then sines.  Loaded, never trained.

    The frequencies are in periods.  Source: arXiv:2011.13456 (NCSN++).
    """

    def __init__(self, dim):
        self.freqs = nnx.Param(jnp.zeros(dim // 2))

    def __call__(self, t):
        t = t.astype(jnp.promote_types(t.dtype, jnp.float32))
        angles = t[:, None] * (2 * math.pi * jax.lax.stop_gradient(self.freqs[...]))
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class GroupNorm(nnx.Module):
    """Normalise `groups` groups of the channels of x [b h w c], then scale and shift; float32 statistics at least."""

    def __init__(self, features, groups, *, dtype=jnp.float32):
        self.groups = groups
        self.weight = nnx.Param(jnp.zeros(features, dtype))
        self.bias = nnx.Param(jnp.zeros(features, dtype))

    def __call__(self, x):
        grouped = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        grouped = grouped.reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)
        grouped = grouped - grouped.mean((1, 3), keepdims=True)
        grouped = grouped * jax.lax.rsqrt(jnp.square(grouped).mean((1, 3), keepdims=True) + EPS)
        return grouped.reshape(x.shape) * self.weight[...] + self.bias[...]


class Conv(nnx.Module):
    """Convolution [b h w in] -> [b h w out] of odd `kernel_size`, zero-padded, after resampling by a filter.

    resample: None | down | up, for images of `size` x `size`.  kernel_size 0: only resample.
    filter_last: filter and halve after the convolution, which then extends past the border by the filter's reach.
    """

    name = None  # see `name_layers`

    def __init__(self, in_features, out_features, kernel_size, *, dtype, resample=None, taps=(1, 1), size=0,
                 filter_last=False):  # fmt: skip
        self.resample, self.taps, self.size, self.filter_last = resample, tuple(taps), size, filter_last
        self.kernel_size, self.dtype = kernel_size, dtype
        if kernel_size:
            self.kernel = nnx.Param(jnp.zeros((kernel_size, kernel_size, in_features, out_features)))
            self.bias = nnx.Param(jnp.zeros(out_features))

    def resampled(self, x):
        """Return x [b h w c] filtered, at half or twice its size."""
        matrix = jnp.asarray(resample_matrix(self.taps, self.size, self.resample, valid=self.filter_last), x.dtype)
        return jnp.einsum("ph,bhwc,qw->bpqc", matrix, x, matrix)

    def convolved(self, x, tape=None):
        """Return the convolution of x [b h w c]."""
        padding = self.kernel_size // 2 + ((len(self.taps) - 1) // 2 if self.filter_last else 0)
        x, kernel, bias = (a.astype(self.dtype) for a in (x, self.kernel[...], self.bias[...]))
        return affine(functools.partial(convolve, padding=padding), x, kernel, self.name, tape) + bias

    def __call__(self, x, tape=None):
        if self.resample and not self.filter_last:
            x = self.resampled(x)
        if self.kernel_size:
            x = self.convolved(x, tape)
        return self.resampled(x) if self.filter_last else x


def attend(qkv, layout):
    """Return single-head self-attention [b h w c] over pixels, from queries, keys and values [b h w 3c].

    layout: order of the 3c channels: `split` (all q, all k, all v) or `interleaved` (q, k, v of each channel in turn).
    """
    batch, height, width, features = qkv.shape
    if layout == "interleaved":
        q, k, v = jnp.moveaxis(qkv.reshape(batch, height * width, features // 3, 3), 3, 0)
    else:
        q, k, v = jnp.moveaxis(qkv.reshape(batch, height * width, 3, features // 3), 2, 0)
    scores = (q * q.shape[-1] ** -0.5) @ k.swapaxes(-1, -2)
    weights = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), axis=-1)
    return (weights.astype(v.dtype) @ v).reshape(batch, height, width, -1)


def add(a, b):
    """Return a + b in float32 at least."""
    return a.astype(jnp.promote_types(a.dtype, jnp.float32)) + b
