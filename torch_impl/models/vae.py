"""Stable Diffusion's autoencoder: images to latents of an eighth of their size, and back.

Source: arXiv:2112.10752; diffusers, models/autoencoders (AutoencoderKL), whose state dict has the canonical names.
It is never trained here: fresh parameters are zeros, for `weights.from_canonical` to fill.

Departs from the source: with a `dtype` of lower precision, norms and the residual stay in float32.
"""

import torch
import torch.nn.functional as F
from torch import nn

from meanflow.errors import UserError
from torch_impl.models.layers import Linear
from torch_impl.models.pixels import GroupNorm, add, attend

LOG_VARIANCE = (-30.0, 20.0)  # log-variances are clipped to this range


def group_norm(features, groups, *, dtype):
    """Return a norm of `groups` groups of channels.  Raises UserError if they do not divide."""
    if features % groups:
        raise UserError(f"{features} channels do not make {groups} groups: norm_num_groups must divide them all")
    return GroupNorm(features, groups, dtype=param_dtype(dtype))


class Conv(nn.Module):
    """Convolution [b in h w] -> [b out h w] of odd `kernel_size`, zero-padded; stride 2 halves images of even size.

    At stride 2 the padding is asymmetric: one row below, one column to the right.
    """

    def __init__(self, in_features, out_features, kernel_size, *, dtype, stride=1):
        super().__init__()
        self.stride, self.compute_dtype = stride, dtype
        self.padding = (0, 1) if stride == 2 else (kernel_size // 2, kernel_size // 2)
        shape = out_features, in_features, kernel_size, kernel_size
        self.weight = nn.Parameter(torch.zeros(shape, dtype=param_dtype(dtype)))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=param_dtype(dtype)))

    def forward(self, x):
        x, weight, bias = (a.to(self.compute_dtype) for a in (x, self.weight, self.bias))
        return F.conv2d(F.pad(x, self.padding * 2), weight, bias, stride=self.stride)


class Resnet(nn.Module):
    """Residual block: x [b in h w] -> [b out h w]."""

    def __init__(self, in_features, out_features, groups, *, dtype):
        super().__init__()
        self.norm1 = group_norm(in_features, groups, dtype=dtype)
        self.conv1 = Conv(in_features, out_features, 3, dtype=dtype)
        self.norm2 = group_norm(out_features, groups, dtype=dtype)
        self.conv2 = Conv(out_features, out_features, 3, dtype=dtype)
        self.conv_shortcut = None if in_features == out_features else Conv(in_features, out_features, 1, dtype=dtype)

    def forward(self, x):
        residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
        x = self.conv1(F.silu(self.norm1(x)))
        x = self.conv2(F.silu(self.norm2(x)))
        return add(residual, x)


class Attention(nn.Module):
    """One head of self-attention over the pixels of x [b c h w], after a norm, added to x."""

    def __init__(self, features, groups, *, dtype):
        super().__init__()
        self.group_norm = group_norm(features, groups, dtype=dtype)

        def linear():
            return Linear(features, features, dtype=dtype).to(param_dtype(dtype))

        self.to_q = linear()
        self.to_k = linear()
        self.to_v = linear()
        self.to_out = nn.ModuleList([linear()])

    def forward(self, x):
        normed = self.group_norm(x).permute(0, 2, 3, 1)
        qkv = torch.cat([self.to_q(normed), self.to_k(normed), self.to_v(normed)], dim=-1)
        attended = attend(qkv.permute(0, 3, 1, 2), "split")
        return add(x, self.to_out[0](attended.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class MidBlock(nn.Module):
    """A residual block, attention and a residual block, at the lowest resolution."""

    def __init__(self, features, groups, *, dtype):
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(features, features, groups, dtype=dtype) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(features, groups, dtype=dtype)])

    def forward(self, x):
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class Resampler(nn.Module):
    """A convolution [b c h w] that halves the image, or follows nearest-neighbour doubling."""

    def __init__(self, features, *, up, dtype):
        super().__init__()
        self.up = up
        self.conv = Conv(features, features, 3, stride=1 if up else 2, dtype=dtype)

    def forward(self, x):
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x)


class Level(nn.Module):
    """`num_blocks` residual blocks of one resolution, then a resampler; resample: None | down | up."""

    def __init__(self, in_features, out_features, num_blocks, groups, *, resample, dtype):
        super().__init__()
        inputs = [in_features] + [out_features] * (num_blocks - 1)
        self.resnets = nn.ModuleList([Resnet(features, out_features, groups, dtype=dtype) for features in inputs])
        resampler = [] if resample is None else [Resampler(out_features, up=resample == "up", dtype=dtype)]
        self.downsamplers = nn.ModuleList(resampler if resample == "down" else [])
        self.upsamplers = nn.ModuleList(resampler if resample == "up" else [])

    def forward(self, x):
        for module in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = module(x)
        return x


class Encoder(nn.Module):
    """Images [b c H W] -> features [b 2 latents h w], halved at each level except the last."""

    def __init__(self, in_channels, latent_channels, widths, num_blocks, groups, *, dtype):
        super().__init__()
        self.conv_in = Conv(in_channels, widths[0], 3, dtype=dtype)
        self.down_blocks = nn.ModuleList([])
        for level, width in enumerate(widths):
            resample = "down" if level < len(widths) - 1 else None
            before = widths[max(level - 1, 0)]
            self.down_blocks.append(Level(before, width, num_blocks, groups, resample=resample, dtype=dtype))
        self.mid_block = MidBlock(widths[-1], groups, dtype=dtype)
        self.conv_norm_out = group_norm(widths[-1], groups, dtype=dtype)
        self.conv_out = Conv(widths[-1], 2 * latent_channels, 3, dtype=dtype)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents [b c h w] -> images [b c H W], through the encoder's levels in reverse, each with one more block."""

    def __init__(self, out_channels, latent_channels, widths, num_blocks, groups, *, dtype):
        super().__init__()
        widths = tuple(reversed(widths))
        self.conv_in = Conv(latent_channels, widths[0], 3, dtype=dtype)
        self.mid_block = MidBlock(widths[0], groups, dtype=dtype)
        self.up_blocks = nn.ModuleList([])
        for level, width in enumerate(widths):
            resample = "up" if level < len(widths) - 1 else None
            before = widths[max(level - 1, 0)]
            self.up_blocks.append(Level(before, width, num_blocks + 1, groups, resample=resample, dtype=dtype))
        self.conv_norm_out = group_norm(widths[-1], groups, dtype=dtype)
        self.conv_out = Conv(widths[-1], out_channels, 3, dtype=dtype)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Images [b in_channels H W] to the moments of a normal over raw latents [b latent_channels h w], and back.

    H = h 2^(levels - 1), with one entry of block_out_channels per level.  Whether images are in [-1, 1] or [0, 1]
    depends on the weights; `dtype` is that of the matmuls and convolutions.
    Raises UserError if norm_num_groups does not divide the channels.
    """

    def __init__(self, *, in_channels, latent_channels, block_out_channels, layers_per_block, norm_num_groups,
                 dtype=torch.float32):  # fmt: skip
        super().__init__()
        sizes = latent_channels, tuple(block_out_channels), layers_per_block, norm_num_groups
        self.encoder = Encoder(in_channels, *sizes, dtype=dtype)
        self.decoder = Decoder(in_channels, *sizes, dtype=dtype)
        self.quant_conv = Conv(2 * latent_channels, 2 * latent_channels, 1, dtype=dtype)
        self.post_quant_conv = Conv(latent_channels, latent_channels, 1, dtype=dtype)

    def tables(self):
        """Return the fixed tables of the canonical state dict: there are none."""
        return {}

    def moments(self, x):
        """Return means, then unclipped log-variances, [b 2 latent_channels h w]."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x):
        """Return mean and log-variance, clipped to `LOG_VARIANCE`, of the raw latents, each [b latent_channels h w]."""
        mean, log_variance = self.moments(x).chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE)

    def decode(self, z):
        """Return the images [b in_channels H W] of raw latents z [b latent_channels h w], not clipped."""
        return self.decoder(self.post_quant_conv(z))


def param_dtype(dtype):
    """Return the dtype in which parameters are kept for computations in `dtype`: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
