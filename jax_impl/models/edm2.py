"""EDM2's magnitude-preserving U-Net in flow time: with one time a flow model, with two Re-MeanFlow's network.

Source: arXiv:2312.02696 (EDM2, configuration G); NVlabs/edm2, training/networks_edm2.py; Xinxi-Zhang/Re-MeanFlow,
edm2/networks_edm2.py.  State dicts of both have the canonical names.

No layer changes the expected magnitude of its input: weights are normalised, sums and concatenations are rescaled,
and there are no biases and no group norms.  EDM's preconditioning is written in flow time: with z at
time t the state (1-t) x + t n, sigma = t/(1-t) and z/(1-t) what EDM denoises, its velocity is

    v = (t - s^2 (1-t)) / q^2 z - s / q F(z / q),   q^2 = t^2 + s^2 (1-t)^2,   s = sigma_data

which is finite at both ends, unlike the quotients of the original.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_impl.models.layers import convolve, matmul
from jax_impl.models.tape import affine, name_layers, rematerialised
from meanflow.errors import UserError

TIME_MAX = 80 / 81  # t of EDM's largest sigma, 80; replaces t = 1, whose sigma is infinite, in a network of one time
TIME_MIN = 1e-8  # smallest t of a network of one time, which takes its logarithm
LABEL_BALANCE, CONCAT_BALANCE, RESIDUAL_BALANCE, ATTENTION_BALANCE = 0.5, 0.5, 0.3, 0.3
MAX_ACTIVATION = 256.0


def normalize(x, axes, eps=1e-4):
    """Divide x by its root mean square over `axes` plus eps; in float32 at least."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.square(x).mean(axes, keepdims=True)
    return x / (eps + jnp.sqrt(jnp.where(square == 0, 1, square)))  # keeps the derivative finite at zero


def mp_silu(x):
    """SiLU, rescaled to keep the magnitude of unit normals."""
    return nnx.silu(x) / 0.596


def mp_sum(a, b, t=0.5):
    """Return (1 - t) a + t b, rescaled to keep their magnitude if they are independent."""
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def mp_cat(a, b, t=0.5):
    """Return a and b [b h w c] concatenated along channels, with shares 1 - t and t of the magnitude."""
    num_a, num_b = a.shape[-1], b.shape[-1]
    scale = math.sqrt((num_a + num_b) / ((1 - t) ** 2 + t**2))
    return jnp.concatenate([a * (scale * (1 - t) / math.sqrt(num_a)), b * (scale * t / math.sqrt(num_b))], axis=-1)


def resample(x, mode):
    """Return x [b h w c] unchanged (None), halved (`down`, means of 2x2) or doubled (`up`, pixels repeated)."""
    batch, height, width, features = x.shape
    if mode == "down":
        return x.reshape(batch, height // 2, 2, width // 2, 2, features).mean((2, 4))
    return x.repeat(2, axis=1).repeat(2, axis=2) if mode == "up" else x


def finite_time(t):
    """Return times t [b] of finite sigma: t = 1 becomes `TIME_MAX`, every earlier time stays."""
    return jnp.where(t < 1, t, TIME_MAX)


def log_sigma(t):
    """Return log(sigma) / 4 of times t [b], the condition of a network of one time."""
    t = jnp.maximum(finite_time(t), TIME_MIN)
    return (jnp.log(t) - jnp.log1p(-t)) / 4


def normalize_weights(params):
    """Return the parameters (nnx.State) with all weights at unit magnitude: EDM2's forced weight normalisation.

    Training applies it before each step; the network normalises again, so gradients are tangential to the weights.
    """
    flat = nnx.to_flat_state(params)
    normalized = [
        (path, leaf.replace(normalize(leaf[...], tuple(range(leaf.ndim - 1)))) if path[-1] == "kernel" else leaf)
        for path, leaf in flat
    ]
    return nnx.from_flat_state(normalized)


class MPFourier(nnx.Module):
    """Features [b dim] of numbers [b]: cosines at random frequencies and phases.  Loaded, never trained."""

    def __init__(self, dim):
        self.freqs = nnx.Param(jnp.zeros(dim))
        self.phases = nnx.Param(jnp.zeros(dim))

    def __call__(self, x):
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        freqs, phases = (jax.lax.stop_gradient(a[...]) for a in (self.freqs, self.phases))
        return jnp.cos(x[:, None] * freqs + phases) * math.sqrt(2)


class MPConv(nnx.Module):
    """Convolution [b h w in] -> [b h w out] of odd `kernel_size`, or linear layer (kernel_size 0), without bias.

    The weight is normalised in every forward pass, so only its direction matters.
    """

    name = None  # see `name_layers`

    def __init__(self, in_features, out_features, kernel_size, *, dtype=None):
        self.kernel_size, self.dtype = kernel_size, dtype
        window = (kernel_size, kernel_size) if kernel_size else ()
        self.kernel = nnx.Param(jnp.zeros((*window, in_features, out_features)))

    def __call__(self, x, tape=None, gain: Any = 1.0):
        kernel = normalize(self.kernel[...], tuple(range(self.kernel.ndim - 1)))
        kernel = kernel * (gain / math.sqrt(kernel[..., 0].size))
        dtype = self.dtype or jnp.promote_types(x.dtype, jnp.float32)
        x, kernel = x.astype(dtype), kernel.astype(dtype)
        layer = functools.partial(convolve, padding=self.kernel_size // 2) if self.kernel_size else matmul
        return affine(layer, x, kernel, self.name, tape)


def attend(qkv, head_width):
    """Return self-attention [b h w c] over pixels, from queries, keys and values [b h w 3c], normalised per head.

    The 3c channels are ordered by head, then by channel, then q, k, v.
    """
    batch, height, width, features = qkv.shape
    qkv = normalize(qkv.reshape(batch, height * width, features // 3 // head_width, head_width, 3), (3,))
    q, k, v = jnp.moveaxis(qkv, (4, 2), (0, 2)).astype(jnp.promote_types(qkv.dtype, jnp.float32))
    scores = (q * head_width**-0.5) @ k.swapaxes(-1, -2)
    x = jax.nn.softmax(scores, axis=-1) @ v
    return x.swapaxes(1, 2).reshape(batch, height, width, -1)


class Block(nnx.Module):
    """Residual block conditioned on emb [b d], with optional attention; the residual stays in float32.

    flavor: `enc` normalises its input per pixel and branches after the skip convolution, `dec` before it.
    mode: see `resample`.
    """

    remat = False

    def __init__(self, in_features, out_features, emb_features, flavor, *, mode=None, attention=False, head_width=64,
                 dtype):  # fmt: skip
        self.flavor, self.mode, self.attention = flavor, mode, attention
        self.head_width = min(head_width, out_features)
        if attention and out_features % self.head_width:
            raise UserError(f"model.head_width {head_width} does not divide the {out_features} channels of a block")
        inner = out_features if flavor == "enc" else in_features
        self.emb_gain = nnx.Param(jnp.zeros(()))
        self.conv_res0 = MPConv(inner, out_features, 3, dtype=dtype)
        self.emb_linear = MPConv(emb_features, out_features, 0)
        self.conv_res1 = MPConv(out_features, out_features, 3, dtype=dtype)
        if in_features != out_features:
            self.conv_skip = MPConv(in_features, out_features, 1, dtype=dtype)
        else:
            self.conv_skip = None
        if attention:
            self.attn_qkv = MPConv(out_features, 3 * out_features, 1, dtype=dtype)
            self.attn_proj = MPConv(out_features, out_features, 1, dtype=dtype)

    def skip(self, x, tape=None):
        """Return x with the block's number of channels."""
        return x if self.conv_skip is None else widen(self.conv_skip(x, tape))

    @rematerialised
    def __call__(self, x, emb, tape=None):
        x = resample(x, self.mode)
        if self.flavor == "enc":
            x = normalize(self.skip(x, tape), (3,))
        y = widen(self.conv_res0(mp_silu(x), tape))
        y = mp_silu(y * (1 + self.emb_linear(emb, tape, self.emb_gain[...]))[:, None, None])
        y = widen(self.conv_res1(y, tape))
        if self.flavor == "dec":
            x = self.skip(x, tape)
        x = mp_sum(x, y, RESIDUAL_BALANCE)
        if self.attention:
            y = attend(self.attn_qkv(x, tape), self.head_width)
            x = mp_sum(x, widen(self.attn_proj(y, tape)), ATTENTION_BALANCE)
        return jnp.clip(x, -MAX_ACTIVATION, MAX_ACTIVATION)


def widen(x):
    """Return x in float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class UNet(nnx.Module):
    """EDM2's U-Net: (x [b h w c], emb [b d]) -> [b h w c]; `embed` computes emb from times and labels."""

    def __init__(self, *, input_size, channels, num_classes, width, channel_mult, channel_mult_emb, channel_mult_noise,
                 num_blocks, attn_resolutions, head_width, interval_embedder, dtype):  # fmt: skip
        self.sizes = tuple(input_size >> level for level in range(len(channel_mult)))
        self.num_blocks, self.num_classes, self.interval_embedder = num_blocks, num_classes, interval_embedder
        noise, emb = width * channel_mult_noise, width * channel_mult_emb
        self.out_gain = nnx.Param(jnp.zeros(()))
        self.emb_fourier = MPFourier(noise)
        if interval_embedder:
            self.emb_noise_t = MPConv(noise, emb, 0)
            self.emb_noise_r = MPConv(noise, emb, 0)
        else:
            self.emb_noise = MPConv(noise, emb, 0)
        self.emb_label = MPConv(num_classes, emb, 0)
        options = {"head_width": head_width, "dtype": dtype}
        enc, dec, features, skips = {}, {}, width, []
        for level, (size, mult) in enumerate(zip(self.sizes, channel_mult, strict=True)):
            name, attention = f"{size}x{size}", size in attn_resolutions
            if level == 0:
                features = width * mult
                enc[f"{name}_conv"] = MPConv(channels + 1, features, 3, dtype=dtype)
            else:
                enc[f"{name}_down"] = Block(features, features, emb, "enc", mode="down", **options)
            skips.append(features)
            for i in range(num_blocks):
                enc[f"{name}_block{i}"] = Block(features, width * mult, emb, "enc", attention=attention, **options)
                features = width * mult
                skips.append(features)
        for size, mult in reversed(list(zip(self.sizes, channel_mult, strict=True))):
            name, attention = f"{size}x{size}", size in attn_resolutions
            if size == self.sizes[-1]:
                dec[f"{name}_in0"] = Block(features, features, emb, "dec", attention=True, **options)
                dec[f"{name}_in1"] = Block(features, features, emb, "dec", **options)
            else:
                dec[f"{name}_up"] = Block(features, features, emb, "dec", mode="up", **options)
            for i in range(num_blocks + 1):
                wide = features + skips.pop()
                dec[f"{name}_block{i}"] = Block(wide, width * mult, emb, "dec", attention=attention, **options)
                features = width * mult
        self.enc, self.dec = nnx.Dict(enc), nnx.Dict(dec)
        self.out_conv = MPConv(features, channels, 3, dtype=dtype)

    def embed_times(self, t, r, tape=None):
        """Return the embedding [b d] of times t, r [b].

        In a network of two times they are flow times; in one of one, t is log(sigma) / 4 and r is ignored.
        """
        if self.interval_embedder:
            return mp_sum(self.emb_noise_t(self.emb_fourier(t), tape), self.emb_noise_r(self.emb_fourier(r), tape))
        return self.emb_noise(self.emb_fourier(t), tape)

    def embed(self, t, r, y, tape=None):
        """Return the condition [b d] from times, see `embed_times`, and labels y [b]; the null label adds nothing."""
        emb = self.embed_times(t, r, tape)
        one_hot = jax.nn.one_hot(y, self.num_classes, dtype=emb.dtype) * math.sqrt(self.num_classes)
        return mp_silu(mp_sum(emb, self.emb_label(one_hot, tape), LABEL_BALANCE))

    def __call__(self, x, emb, tape=None) -> Any:
        x, skips = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1), []
        for level, size in enumerate(self.sizes):
            name = f"{size}x{size}"
            x = self.enc[f"{name}_down"](x, emb, tape=tape) if level else widen(self.enc[f"{name}_conv"](x, tape))
            skips.append(x)
            for i in range(self.num_blocks):
                x = self.enc[f"{name}_block{i}"](x, emb, tape=tape)
                skips.append(x)
        for size in reversed(self.sizes):
            name = f"{size}x{size}"
            if size == self.sizes[-1]:
                x = self.dec[f"{name}_in0"](x, emb, tape=tape)
                x = self.dec[f"{name}_in1"](x, emb, tape=tape)
            else:
                x = self.dec[f"{name}_up"](x, emb, tape=tape)
            for i in range(self.num_blocks + 1):
                x = self.dec[f"{name}_block{i}"](mp_cat(x, skips.pop(), CONCAT_BALANCE), emb, tape=tape)
        return widen(self.out_conv(x, tape, self.out_gain[...]))


class EDM2(nnx.Module):
    """Average velocity u = net(z, t, r, y), or without interval_embedder a flow model's velocity v, which ignores r.

    z: [b h w c] state, h = w = input_size.  t, r: [b] times in [0, 1], r <= t, t = 1 is noise, which a network of one
    time replaces by `TIME_MAX`.  y: [b] labels in [0, num_classes], the last the null class.  Returns [b h w c] in
    float32 at least.  `dtype` is that of the convolutions.  logvar_channels: features of the log-variance head, 0
    for none; nothing trains it here.  Raises UserError for sizes that do not divide.
    """

    takes_tape = True

    def __init__(self, *, interval_embedder, logvar_channels, sigma_data, dtype=jnp.float32, **sizes):
        self.num_classes, self.interval_embedder, self.sigma_data = sizes["num_classes"], interval_embedder, sigma_data
        self.unet = UNet(**sizes, interval_embedder=interval_embedder, dtype=dtype)
        if logvar_channels:
            self.logvar_fourier = MPFourier(logvar_channels)
            self.logvar_linear = MPConv(logvar_channels, 1, 0)
        name_layers(self)

    @classmethod
    def from_config(cls, c):
        """Build from `config.model`."""
        return cls(
            input_size=c.input_size, channels=c.channels, num_classes=c.num_classes, width=c.width,
            channel_mult=c.channel_mult, channel_mult_emb=c.channel_mult_emb, channel_mult_noise=c.channel_mult_noise,
            num_blocks=c.num_blocks, attn_resolutions=c.attn_resolutions, head_width=c.head_width,
            interval_embedder=c.interval_embedder, logvar_channels=c.logvar_channels, sigma_data=c.sigma_data,
            dtype=jnp.dtype(c.compute_dtype),
        )  # fmt: skip

    def tables(self):
        """Return the fixed tables of the canonical state dict: none."""
        return {}

    def log_variance(self, t, r):
        """Return EDM2's predicted log-variance [b] of the error of its denoised images."""
        return self.logvar_linear(self.logvar_fourier(log_sigma(t)))[:, 0]

    def __call__(self, z, t, r, y, tape=None):
        t = t if self.interval_embedder else finite_time(t)
        emb = self.unet.embed(t if self.interval_embedder else log_sigma(t), r, y, tape)
        t, s = t[:, None, None, None], self.sigma_data
        q = jnp.sqrt(t**2 + (s * (1 - t)) ** 2)
        return (t - s**2 * (1 - t)) / q**2 * z - s / q * self.unet(z / q, emb, tape)
