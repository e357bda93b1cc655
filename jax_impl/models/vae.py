"""Stable Diffusion's autoencoder: images to latents of an eighth of their size, and back.

Source: arXiv:2112.10752; diffusers, models/autoencoders (AutoencoderKL), whose state dict has the canonical names.
It is never trained here: fresh parameters are zeros, for `weights.from_canonical` to fill.

Departs from the source: with a `dtype` of lower precision, norms and the residual stay in float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jax_impl.models.layers import zeros
from jax_impl.models.pixels import GroupNorm, add, attend
from meanflow.errors import UserError

LOG_VARIANCE = (-30.0, 20.0)  # log-variances are clipped to this range


def group_norm(features, groups, *, dtype):
    """Return a norm of `groups` groups of channels.  Raises UserError if they do not divide."""
    if features % groups:
        raise UserError(f"{features} channels do not make {groups} groups: norm_num_groups must divide them all")
    return GroupNorm(features, groups, dtype=param_dtype(dtype))


class Conv(nnx.Module):
    """Convolution [b h w in] -> [b h w out] of odd `kernel_size`, zero-padded; stride 2 halves images of even size.

    At stride 2 the padding is asymmetric: one row below, one column to the right.
    """

    def __init__(self, in_features, out_features, kernel_size, *, dtype, stride=1):
        self.stride, self.dtype = stride, dtype
        self.padding = (0, 1) if stride == 2 else (kernel_size // 2, kernel_size // 2)
        self.kernel = nnx.Param(jnp.zeros((kernel_size, kernel_size, in_features, out_features), param_dtype(dtype)))
        self.bias = nnx.Param(jnp.zeros(out_features, param_dtype(dtype)))

    def __call__(self, x):
        x, kernel, bias = (a.astype(self.dtype) for a in (x, self.kernel[...], self.bias[...]))
        strides, padding = (self.stride, self.stride), [self.padding] * 2
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, None, None, dimensions) + bias


class Resnet(nnx.Module):
    """Residual block: x [b h w in] -> [b h w out]."""

    def __init__(self, in_features, out_features, groups, *, dtype):
        self.norm1 = group_norm(in_features, groups, dtype=dtype)
        self.conv1 = Conv(in_features, out_features, 3, dtype=dtype)
        self.norm2 = group_norm(out_features, groups, dtype=dtype)
        self.conv2 = Conv(out_features, out_features, 3, dtype=dtype)
        self.conv_shortcut = None if in_features == out_features else Conv(in_features, out_features, 1, dtype=dtype)

    def __call__(self, x):
        residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
        x = self.conv1(nnx.silu(self.norm1(x)))
        x = self.conv2(nnx.silu(self.norm2(x)))
        return add(residual, x)


class Attention(nnx.Module):
    """One head of self-attention over the pixels of x [b h w c], after a norm, added to x."""

    def __init__(self, features, groups, *, dtype):
        self.group_norm = group_norm(features, groups, dtype=dtype)

        def linear():
            return nnx.Linear(
                features, features, dtype=dtype, param_dtype=param_dtype(dtype), kernel_init=zeros, bias_init=zeros,
                rngs=nnx.Rngs(0),
            )  # fmt: skip

        self.to_q = linear()
        self.to_k = linear()
        self.to_v = linear()
        self.to_out = nnx.List([linear()])

    def __call__(self, x):
        normed = self.group_norm(x)
        qkv = jnp.concatenate([self.to_q(normed), self.to_k(normed), self.to_v(normed)], axis=-1)
        return add(x, self.to_out[0](attend(qkv, "split")))


class MidBlock(nnx.Module):
    """A residual block, attention and a residual block, at the lowest resolution."""

    def __init__(self, features, groups, *, dtype):
        self.resnets = nnx.List([Resnet(features, features, groups, dtype=dtype) for _ in range(2)])
        self.attentions = nnx.List([Attention(features, groups, dtype=dtype)])

    def __call__(self, x):
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class Resampler(nnx.Module):
    """A convolution [b h w c] that halves the image, or follows nearest-neighbour doubling."""

    def __init__(self, features, *, up, dtype):
        self.up = up
        self.conv = Conv(features, features, 3, stride=1 if up else 2, dtype=dtype)

    def __call__(self, x):
        if self.up:
            x = x.repeat(2, axis=1).repeat(2, axis=2)
        return self.conv(x)


class Level(nnx.Module):
    """`num_blocks` residual blocks of one resolution, then a resampler; resample: None | down | up."""

    def __init__(self, in_features, out_features, num_blocks, groups, *, resample, dtype):
        inputs = [in_features] + [out_features] * (num_blocks - 1)
        self.resnets = nnx.List([Resnet(features, out_features, groups, dtype=dtype) for features in inputs])
        resampler = [] if resample is None else [Resampler(out_features, up=resample == "up", dtype=dtype)]
        self.downsamplers = nnx.List(resampler if resample == "down" else [])
        self.upsamplers = nnx.List(resampler if resample == "up" else [])

    def __call__(self, x):
        for module in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = module(x)
        return x


class Encoder(nnx.Module):
    """Images [b H W c] -> features [b h w 2 latents], halved at each level except the last."""

    def __init__(self, in_channels, latent_channels, widths, num_blocks, groups, *, dtype):
        self.conv_in = Conv(in_channels, widths[0], 3, dtype=dtype)
        self.down_blocks = nnx.List([])
        for level, width in enumerate(widths):
            resample = "down" if level < len(widths) - 1 else None
            before = widths[max(level - 1, 0)]
            self.down_blocks.append(Level(before, width, num_blocks, groups, resample=resample, dtype=dtype))
        self.mid_block = MidBlock(widths[-1], groups, dtype=dtype)
        self.conv_norm_out = group_norm(widths[-1], groups, dtype=dtype)
        self.conv_out = Conv(widths[-1], 2 * latent_channels, 3, dtype=dtype)

    def __call__(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """Latents [b h w c] -> images [b H W c], through the encoder's levels in reverse, each with one more block."""

    def __init__(self, out_channels, latent_channels, widths, num_blocks, groups, *, dtype):
        widths = tuple(reversed(widths))
        self.conv_in = Conv(latent_channels, widths[0], 3, dtype=dtype)
        self.mid_block = MidBlock(widths[0], groups, dtype=dtype)
        self.up_blocks = nnx.List([])
        for level, width in enumerate(widths):
            resample = "up" if level < len(widths) - 1 else None
            before = widths[max(level - 1, 0)]
            self.up_blocks.append(Level(before, width, num_blocks + 1, groups, resample=resample, dtype=dtype))
        self.conv_norm_out = group_norm(widths[-1], groups, dtype=dtype)
        self.conv_out = Conv(widths[-1], out_channels, 3, dtype=dtype)

    def __call__(self, z):
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Images [b H W in_channels] to the moments of a normal over raw latents [b h w latent_channels], and back.

    H = h 2^(levels - 1), with one entry of block_out_channels per level.  Whether images are in [-1, 1] or [0, 1]
    depends on the weights; `dtype` is that of the matmuls and convolutions.
    Raises UserError if norm_num_groups does not divide the channels.
    """

    def __init__(self, *, in_channels, latent_channels, block_out_channels, layers_per_block, norm_num_groups,
                 dtype=jnp.float32):  # fmt: skip
        sizes = latent_channels, tuple(block_out_channels), layers_per_block, norm_num_groups
        self.encoder = Encoder(in_channels, *sizes, dtype=dtype)
        self.decoder = Decoder(in_channels, *sizes, dtype=dtype)
        self.quant_conv = Conv(2 * latent_channels, 2 * latent_channels, 1, dtype=dtype)
        self.post_quant_conv = Conv(latent_channels, latent_channels, 1, dtype=dtype)

    def tables(self):
        """Return the fixed tables of the canonical state dict: there are none."""
        return {}

    def moments(self, x):
        """Return means, then unclipped log-variances, [b h w 2 latent_channels]."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x):
        """Return mean and log-variance, clipped to `LOG_VARIANCE`, of the raw latents, each [b h w latent_channels]."""
        mean, log_variance = jnp.split(self.moments(x), 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE)

    def decode(self, z):
        """Return the images [b H W in_channels] of raw latents z [b h w latent_channels], not clipped."""
        return self.decoder(self.post_quant_conv(z))


def param_dtype(dtype):
    """Return the dtype in which parameters are kept for computations in `dtype`: float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)
