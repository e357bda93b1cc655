"""Layers that several networks share: norms, embeddings of time, label and position.

Parameters are made of zeros, for `meanflow.weights.initial` or loaded weights to replace, and kept in float32 (or
float64); matmuls run in `dtype`; time features and norms in at least float32.
Attribute names are those of the official PyTorch checkpoints: the canonical names.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from torch_impl.models.tape import affine


def zeros(self):
    """Fill a layer's parameters with zeros; PyTorch's own method draws them from the global random state."""
    for parameter in self.parameters():
        nn.init.zeros_(parameter)


class Linear(nn.Linear):
    """An affine layer computed in `dtype` (None: the input's) from float32 parameters.

    The bias is added to the product, not inside it: compiled, the addition fuses with what follows and costs no pass.
    """

    name = None  # see `name_layers`
    reset_parameters = zeros

    def __init__(self, in_features, out_features, *, dtype, bias=True):
        super().__init__(in_features, out_features, bias=bias)
        self.compute_dtype = dtype

    def forward(self, x, tape=None):
        dtype = self.compute_dtype or x.dtype
        y = affine(F.linear, x.to(dtype), self.weight.to(dtype), self.name, tape)
        return y if self.bias is None else y + self.bias.to(dtype)


def gelu(x):
    """Return the tanh-approximate GELU of x; compiled, as an equal sigmoid form that is cheaper on a CPU."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)


def layer_norm(x, eps=1e-6):
    """Normalise the last axis to mean 0 and variance 1, without scale and shift; float32 statistics at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def rms_norm(x, eps=1e-6):
    """Divide the last axis by its root mean square; in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def modulate(x, shift, scale):
    """Shift and scale the tokens x [b n d] by vectors [b d]: x (1 + scale) + shift."""
    return x * (1 + scale[:, None]) + shift[:, None]


def timestep_features(t, dim=256, max_period=10_000.0):
    """Return sinusoidal features [b dim] of times t [b] in [0, 1]: cosines first, then sines.

    Frequencies exp(-ln(max_period) i / (dim/2)), i < dim/2; t is not multiplied by 1000.
    Source: Gsunshine/meanflow, models/models_dit.py, TimestepEmbedder.
    """
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    i = torch.arange(dim // 2, dtype=torch.float64, device=t.device)
    frequencies = torch.exp(-math.log(max_period) * i / (dim // 2))
    angles = t[:, None] * frequencies.to(t.dtype)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class TimestepEmbedder(nn.Module):
    """Embed times [b] into vectors [b width]: sinusoidal features, then a two-layer MLP in float32."""

    def __init__(self, width, *, features=256):
        super().__init__()
        self.features = features
        self.mlp = nn.ModuleDict(
            {
                "0": Linear(features, width, dtype=None),
                "2": Linear(width, width, dtype=None),
            }
        )

    def forward(self, t, tape=None):
        x = timestep_features(t, self.features)
        x = F.silu(self.mlp["0"](x, tape))
        return self.mlp["2"](x, tape)


def embedding(num, width):
    """Return a table of `num` vectors of this width."""
    return nn.Embedding.from_pretrained(torch.zeros(num, width), freeze=False)


class LabelEmbedder(nn.Module):
    """Embed labels [b] in [0, num_classes] into vectors [b width]; the last row is the null class."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.embedding_table = embedding(num_classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


class _Patches(nn.Conv2d):
    reset_parameters = zeros


class PatchEmbed(nn.Module):
    """Cut images [b c h w] into patches and map each to a token [b n width]."""

    name = None  # see `name_layers`

    def __init__(self, patch_size, channels, width, *, dtype):
        super().__init__()
        self.compute_dtype = dtype
        self.proj = _Patches(channels, width, patch_size, patch_size)

    def forward(self, x, tape=None):
        x, weight, bias = (a.to(self.compute_dtype) for a in (x, self.proj.weight, self.proj.bias))  # pyright: ignore
        x = affine(functools.partial(F.conv2d, stride=self.proj.stride), x, weight, self.name, tape)
        return x.flatten(2).transpose(1, 2) + bias


def unpatchify(x, channels):
    """Reassemble tokens [b n p*p*c], channel fastest, into images [b c h w]."""
    batch, tokens, features = x.shape
    grid, patch = math.isqrt(tokens), math.isqrt(features // channels)
    x = x.reshape(batch, grid, grid, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, grid * patch, grid * patch)
