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

import torch
import torch.nn.functional as F
from torch import nn

from meanflow.errors import UserError
from torch_impl.models.tape import affine, name_layers, rematerialised

TIME_MAX = 80 / 81  # t of EDM's largest sigma, 80; replaces t = 1, whose sigma is infinite, in a network of one time
TIME_MIN = 1e-8  # smallest t of a network of one time, which takes its logarithm
LABEL_BALANCE, CONCAT_BALANCE, RESIDUAL_BALANCE, ATTENTION_BALANCE = 0.5, 0.5, 0.3, 0.3
MAX_ACTIVATION = 256.0


def normalize(x, axes, eps=1e-4):
    """Divide x by its root mean square over `axes` plus eps; in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    square = x.square().mean(axes, keepdim=True)
    return x / (eps + torch.where(square == 0, 1, square).sqrt())  # keeps the derivative finite at zero


def mp_silu(x):
    """SiLU, rescaled to keep the magnitude of unit normals."""
    return F.silu(x) / 0.596


def mp_sum(a, b, t=0.5):
    """Return (1 - t) a + t b, rescaled to keep their magnitude if they are independent."""
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def mp_cat(a, b, t=0.5):
    """Return a and b [b c h w] concatenated along channels, with shares 1 - t and t of the magnitude."""
    num_a, num_b = a.shape[1], b.shape[1]
    scale = math.sqrt((num_a + num_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(num_a)), b * (scale * t / math.sqrt(num_b))], dim=1)


def resample(x, mode):
    """Return x [b c h w] unchanged (None), halved (`down`, means of 2x2) or doubled (`up`, pixels repeated)."""
    batch, features, height, width = x.shape
    if mode == "down":
        return x.reshape(batch, features, height // 2, 2, width // 2, 2).mean((3, 5))
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) if mode == "up" else x


def finite_time(t):
    """Return times t [b] of finite sigma: t = 1 becomes `TIME_MAX`, every earlier time stays."""
    return torch.where(t < 1, t, TIME_MAX)


def log_sigma(t):
    """Return log(sigma) / 4 of times t [b], the condition of a network of one time."""
    t = finite_time(t).clamp(min=TIME_MIN)
    return (torch.log(t) - torch.log1p(-t)) / 4


@torch.no_grad()
def normalize_weights(params):
    """Normalise the weights in {name: tensor} to unit magnitude, in place: EDM2's forced weight normalisation.

    Training applies it before each step; the network normalises again, so gradients are tangential to the weights.
    """
    for name, weight in params.items():
        if name.endswith(".weight"):
            weight.copy_(normalize(weight, tuple(range(1, weight.ndim))))


class MPFourier(nn.Module):
    """Features [b dim] of numbers [b]: cosines at random frequencies and phases.  Loaded, never trained."""

    def __init__(self, dim):
        super().__init__()
        self.freqs = nn.Parameter(torch.zeros(dim), requires_grad=False)
        self.phases = nn.Parameter(torch.zeros(dim), requires_grad=False)

    def forward(self, x):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch.cos(x[:, None] * self.freqs + self.phases) * math.sqrt(2)


class MPConv(nn.Module):
    """Convolution [b in h w] -> [b out h w] of odd `kernel_size`, or linear layer (kernel_size 0), without bias.

    The weight is normalised in every forward pass, so only its direction matters.
    """

    name = None  # see `name_layers`

    def __init__(self, in_features, out_features, kernel_size, *, dtype=None):
        super().__init__()
        self.kernel_size, self.compute_dtype = kernel_size, dtype
        window = (kernel_size, kernel_size) if kernel_size else ()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, *window))

    def forward(self, x, tape=None, gain=1.0):
        weight = normalize(self.weight, tuple(range(1, self.weight.ndim)))
        weight = weight * (gain / math.sqrt(weight[0].numel()))
        dtype = self.compute_dtype or torch.promote_types(x.dtype, torch.float32)
        x, weight = x.to(dtype), weight.to(dtype)
        layer = functools.partial(F.conv2d, padding=self.kernel_size // 2) if self.kernel_size else F.linear
        return affine(layer, x, weight, self.name, tape)


def attend(qkv, head_width):
    """Return self-attention [b c h w] over pixels, from queries, keys and values [b 3c h w], normalised per head.

    The 3c channels are ordered by head, then by channel, then q, k, v.
    """
    batch, features, height, width = qkv.shape
    qkv = normalize(qkv.reshape(batch, features // 3 // head_width, head_width, 3, height * width), (2,))
    q, k, v = qkv.permute(3, 0, 1, 4, 2).to(torch.promote_types(qkv.dtype, torch.float32))
    scores = (q * head_width**-0.5) @ k.mT
    x = torch.softmax(scores, dim=-1) @ v
    return x.mT.reshape(batch, -1, height, width)


class Block(nn.Module):
    """Residual block conditioned on emb [b d], with optional attention; the residual stays in float32.

    flavor: `enc` normalises its input per pixel and branches after the skip convolution, `dec` before it.
    mode: see `resample`.
    """

    remat = False

    def __init__(self, in_features, out_features, emb_features, flavor, *, mode=None, attention=False, head_width=64,
                 dtype):  # fmt: skip
        super().__init__()
        self.flavor, self.mode, self.attention = flavor, mode, attention
        self.head_width = min(head_width, out_features)
        if attention and out_features % self.head_width:
            raise UserError(f"model.head_width {head_width} does not divide the {out_features} channels of a block")
        inner = out_features if flavor == "enc" else in_features
        self.emb_gain = nn.Parameter(torch.zeros(1))
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
    def forward(self, x, emb, tape=None):
        x = resample(x, self.mode)
        if self.flavor == "enc":
            x = normalize(self.skip(x, tape), (1,))
        y = widen(self.conv_res0(mp_silu(x), tape))
        y = mp_silu(y * (1 + self.emb_linear(emb, tape, self.emb_gain))[:, :, None, None])
        y = widen(self.conv_res1(y, tape))
        if self.flavor == "dec":
            x = self.skip(x, tape)
        x = mp_sum(x, y, RESIDUAL_BALANCE)
        if self.attention:
            y = attend(self.attn_qkv(x, tape), self.head_width)
            x = mp_sum(x, widen(self.attn_proj(y, tape)), ATTENTION_BALANCE)
        return x.clamp(-MAX_ACTIVATION, MAX_ACTIVATION)


def widen(x):
    """Return x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class UNet(nn.Module):
    """EDM2's U-Net: (x [b c h w], emb [b d]) -> [b c h w]; `embed` computes emb from times and labels."""

    def __init__(self, *, input_size, channels, num_classes, width, channel_mult, channel_mult_emb, channel_mult_noise,
                 num_blocks, attn_resolutions, head_width, interval_embedder, dtype):  # fmt: skip
        super().__init__()
        self.sizes = tuple(input_size >> level for level in range(len(channel_mult)))
        self.num_blocks, self.num_classes, self.interval_embedder = num_blocks, num_classes, interval_embedder
        noise, emb = width * channel_mult_noise, width * channel_mult_emb
        self.out_gain = nn.Parameter(torch.zeros(1))
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
        self.enc, self.dec = nn.ModuleDict(enc), nn.ModuleDict(dec)
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
        one_hot = y[:, None] == torch.arange(self.num_classes, device=y.device)  # F.one_hot would read y on a CPU
        one_hot = one_hot.to(emb.dtype) * math.sqrt(self.num_classes)
        return mp_silu(mp_sum(emb, self.emb_label(one_hot, tape), LABEL_BALANCE))

    def forward(self, x, emb, tape=None):
        x, skips = torch.cat([x, torch.ones_like(x[:, :1])], dim=1), []
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
        return widen(self.out_conv(x, tape, self.out_gain))


class EDM2(nn.Module):
    """Average velocity u = net(z, t, r, y), or without interval_embedder a flow model's velocity v, which ignores r.

    z: [b c h w] state, h = w = input_size.  t, r: [b] times in [0, 1], r <= t, t = 1 is noise, which a network of one
    time replaces by `TIME_MAX`.  y: [b] labels in [0, num_classes], the last the null class.  Returns [b c h w] in
    float32 at least.  `dtype` is that of the convolutions.  logvar_channels: features of the log-variance head, 0
    for none; nothing trains it here.  Raises UserError for sizes that do not divide.
    """

    takes_tape = True

    def __init__(self, *, interval_embedder, logvar_channels, sigma_data, dtype=torch.float32, **sizes):
        super().__init__()
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
            dtype=getattr(torch, c.compute_dtype),
        )  # fmt: skip

    def tables(self):
        """Return the fixed tables of the canonical state dict: none."""
        return {}

    def log_variance(self, t, r):
        """Return EDM2's predicted log-variance [b] of the error of its denoised images."""
        return self.logvar_linear(self.logvar_fourier(log_sigma(t)))[:, 0]

    def forward(self, z, t, r, y, tape=None):
        t = t if self.interval_embedder else finite_time(t)
        emb = self.unet.embed(t if self.interval_embedder else log_sigma(t), r, y, tape)
        t, s = t[:, None, None, None], self.sigma_data
        q = (t**2 + (s * (1 - t)) ** 2).sqrt()
        return (t - s**2 * (1 - t)) / q**2 * z - s / q * self.unet(z / q, emb, tape)
