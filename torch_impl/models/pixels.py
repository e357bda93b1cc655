"""Layers over pixels, for the U-Net and the autoencoder: norm, convolution with resampling, attention, dropout."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from meanflow.tables import filter_table, resample_matrix
from torch_impl.models.tape import affine

EPS = 1e-6  # of all group norms
MASK32 = 2**32 - 1


def positional_features(t, dim, max_period=10_000.0):
    """Return sinusoidal features [b dim] of times t [b]: cosines first, then sines, frequencies from 1 to 1/max_period.

    Source: NVlabs/edm, training/networks.py, PositionalEmbedding with its endpoint.
    """
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    i = torch.arange(dim // 2, dtype=torch.float64, device=t.device)
    frequencies = (1 / max_period) ** (i / (dim // 2 - 1))
    angles = t[:, None] * frequencies.to(t.dtype)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def hash32(x):
    """Hash integers in [0, 2^32), int64, into random-looking ones, one to one.

    Source: the `lowbias32` function of Chris Wellons' hash-prospector, after an offset.
    """
    x = (x + 0x9E3779B9) & MASK32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK32
    x = ((x ^ (x >> 15)) * (0x846CA68B - 2**32)) & MASK32  # the same bits; the product stays within int64
    return x ^ (x >> 16)


def keep_masks(draws, num_entries, prob):
    """Return which of `num_entries` entries dropout keeps, [b n] bool, each kept with probability 1 - prob.

    draws: [b] uniforms in [0, 1).  A mask is a function of (row's draw, entry) in exact integer arithmetic: the same in
    both frameworks, on any number of devices and in any number of micro-batches.
    """
    seeds = hash32(torch.floor(draws * 2**24).long())
    places = hash32(torch.arange(num_entries, device=draws.device))
    return hash32(places[None] ^ seeds[:, None]) >= round(prob * 2**32)


def dropout(x, prob, keep):
    """Set entries of x [b c h w] to zero where not `keep` [b h*w*c] and scale the others by 1 / (1 - prob)."""
    batch, channels, height, width = x.shape
    keep = keep.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
    return torch.where(keep, x / (1 - prob), 0)


class FourierFeatures(nn.Module):
    """Features [b dim] of times t [b] at random frequencies: cosines, then sines.  Loaded, never trained.

    The frequencies are in periods.  Source: arXiv:2011.13456 (NCSN++).
    """

    def __init__(self, dim):
        super().__init__()
        self.freqs = nn.Parameter(torch.zeros(dim // 2), requires_grad=False)

    def forward(self, t):
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        angles = t[:, None] * (2 * math.pi * self.freqs)
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class GroupNorm(nn.Module):
    """Normalise `groups` groups of the channels of x [b c h w], then scale and shift; float32 statistics at least.

    Written out, because torch.func.jvp of `F.group_norm` does not compile.
    """

    def __init__(self, features, groups, *, dtype=torch.float32):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(features, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(features, dtype=dtype))

    def forward(self, x):
        grouped = x.to(torch.promote_types(x.dtype, torch.float32))
        grouped = grouped.reshape(x.shape[0], self.groups, -1)
        grouped = grouped - grouped.mean(2, keepdim=True)
        grouped = grouped * torch.rsqrt(grouped.square().mean(2, keepdim=True) + EPS)
        return grouped.reshape(x.shape) * self.weight[:, None, None] + self.bias[:, None, None]


class Conv(nn.Module):
    """Convolution [b in h w] -> [b out h w] of odd `kernel_size`, zero-padded, after resampling by a filter.

    resample: None | down | up, for images of `size` x `size`.  kernel_size 0: only resample.
    filter_last: filter and halve after the convolution, which then extends past the border by the filter's reach.
    """

    name = None  # see `name_layers`

    def __init__(self, in_features, out_features, kernel_size, *, dtype, resample=None, taps=(1, 1), size=0,
                 filter_last=False):  # fmt: skip
        super().__init__()
        self.resample, self.taps, self.size, self.filter_last = resample, tuple(taps), size, filter_last
        self.kernel_size, self.compute_dtype = kernel_size, dtype
        if kernel_size:
            self.weight = nn.Parameter(torch.zeros(out_features, in_features, kernel_size, kernel_size))
            self.bias = nn.Parameter(torch.zeros(out_features))
        if resample:
            self.register_buffer("resample_filter", torch.from_numpy(filter_table(taps)))
            matrix = resample_matrix(taps, size, resample, valid=filter_last)
            self.register_buffer("matrix", torch.from_numpy(matrix), persistent=False)

    def resampled(self, x):
        """Return x [b c h w] filtered, at half or twice its size."""
        matrix = self.matrix.to(x.dtype)
        return matrix @ x @ matrix.T

    def convolved(self, x, tape=None):
        """Return the convolution of x [b c h w]."""
        padding = self.kernel_size // 2 + ((len(self.taps) - 1) // 2 if self.filter_last else 0)
        x, weight, bias = (a.to(self.compute_dtype) for a in (x, self.weight, self.bias))
        return affine(functools.partial(F.conv2d, padding=padding), x, weight, self.name, tape) + bias[:, None, None]

    def forward(self, x, tape=None):
        if self.resample and not self.filter_last:
            x = self.resampled(x)
        if self.kernel_size:
            x = self.convolved(x, tape)
        return self.resampled(x) if self.filter_last else x


def attend(qkv, layout):
    """Return single-head self-attention [b c h w] over pixels, from queries, keys and values [b 3c h w].

    layout: order of the 3c channels: `split` (all q, all k, all v) or `interleaved` (q, k, v of each channel in turn).
    """
    batch, features, height, width = qkv.shape
    if layout == "interleaved":
        q, k, v = qkv.reshape(batch, features // 3, 3, height * width).unbind(2)
    else:
        q, k, v = qkv.reshape(batch, 3, features // 3, height * width).unbind(1)
    scores = (q * q.shape[1] ** -0.5).transpose(-1, -2) @ k
    weights = torch.softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), dim=-1)
    return (v @ weights.to(v.dtype).transpose(-1, -2)).reshape(batch, -1, height, width)


def add(a, b):
    """Return a + b in float32 at least."""
    return a.to(torch.promote_types(a.dtype, torch.float32)) + b
