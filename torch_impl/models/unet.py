"""U-Net for MeanFlow on pixels: EDM's SongUNet, conditioned on two times and on augmentation labels.

Source: arXiv:2011.13456 (DDPM++ and NCSN++), arXiv:2206.00364 (EDM), arXiv:2505.13447 (MeanFlow, appendix A).
Two published variants are settings of one network: Gsunshine/py-meanflow, models/unet.py (time_embedding joint,
qkv_layout split, filter 1-3-3-1) and zhuyu-cs/MeanFlow, branch cifar10, unet.py (separate, interleaved, 1-1).  State
dicts of both have canonical names.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from meanflow.errors import UserError
from meanflow.tables import filter_table, resample_matrix
from torch_impl.models.layers import Linear
from torch_impl.models.tape import affine, name_layers, rematerialised

SKIP_SCALE = math.sqrt(0.5)  # keeps the variance of a sum of two
MASK32 = 2**32 - 1


def nearly_zero(weight):
    """Fill a weight [out in k k] Xavier-uniformly, times 1e-5."""
    nn.init.xavier_uniform_(weight, gain=1e-5)


def for_attention(weight):
    """Fill a weight [out in k k] Xavier-uniformly, times sqrt(0.2)."""
    nn.init.xavier_uniform_(weight, gain=math.sqrt(0.2))


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
    """Mix integers in [0, 2^32), int64, into integers that look random, one to one.

    Source: the `lowbias32` function of Chris Wellons' hash-prospector, after an offset.
    """
    x = (x + 0x9E3779B9) & MASK32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK32
    x = ((x ^ (x >> 15)) * (0x846CA68B - 2**32)) & MASK32  # the same bits; the product stays within int64
    return x ^ (x >> 16)


def keep_masks(draws, num_entries, prob):
    """Return which of `num_entries` entries dropout keeps, [b n] bool, each with probability 1 - prob.

    draws: [b] uniforms in [0, 1).  A mask is a function of (draw of the row, entry) in exact integer arithmetic: the
    same in both frameworks, on any number of devices and in any number of micro-batches.
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
    """Features [b dim] of times t [b] at random frequencies: cosines, then sines.  Loaded, but never trained.

    scale: standard deviation of the frequencies, in periods.  Source: arXiv:2011.13456 (NCSN++).
    """

    def __init__(self, dim, *, scale=16.0):
        super().__init__()
        self.freqs = nn.Parameter(torch.randn(dim // 2) * scale, requires_grad=False)

    def forward(self, t):
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        angles = t[:, None] * (2 * math.pi * self.freqs)
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class GroupNorm(nn.Module):
    """Normalise groups of at least 4 channels of x [b c h w], at most 32 groups; float32 statistics at least.

    Written out, because torch.func.jvp of `F.group_norm` does not compile.
    """

    def __init__(self, features, *, eps=1e-6):
        super().__init__()
        self.groups, self.eps = min(32, features // 4), eps
        if features % max(self.groups, 1) or not self.groups:
            raise UserError(
                f"{features} channels cannot be normalised in groups: model.width must be a multiple of 4, and of 32 "
                "where a block sees more than 128 channels"
            )
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x):
        grouped = x.to(torch.promote_types(x.dtype, torch.float32))
        grouped = grouped.reshape(x.shape[0], self.groups, -1)
        grouped = grouped - grouped.mean(2, keepdim=True)
        grouped = grouped * torch.rsqrt(grouped.square().mean(2, keepdim=True) + self.eps)
        return grouped.reshape(x.shape) * self.weight[:, None, None] + self.bias[:, None, None]


class Conv(nn.Module):
    """Convolution [b in h w] -> [b out h w] of odd `kernel_size`, zero-padded, after down- or upsampling by a filter.

    resample: None | down | up, of images of `size` x `size`.  kernel_size 0: no convolution, only the resampling.
    filter_last: filter and halve after the convolution, which then runs beyond the border as far as the filter sees.
    """

    name = None  # see `name_layers`

    def __init__(self, in_features, out_features, kernel_size, *, dtype, kernel_init=nn.init.xavier_uniform_,
                 resample=None, taps=(1, 1), size=0, filter_last=False):  # fmt: skip
        super().__init__()
        self.resample, self.taps, self.size, self.filter_last = resample, tuple(taps), size, filter_last
        self.kernel_size, self.compute_dtype = kernel_size, dtype
        if kernel_size:
            self.weight = nn.Parameter(torch.empty(out_features, in_features, kernel_size, kernel_size))
            self.bias = nn.Parameter(torch.zeros(out_features))
            kernel_init(self.weight)
        if resample:
            self.register_buffer("resample_filter", torch.from_numpy(filter_table(taps)))
            matrix = resample_matrix(taps, size, resample, valid=filter_last)
            self.register_buffer("matrix", torch.from_numpy(matrix), persistent=False)

    def resampled(self, x):
        """Return x [b c h w] filtered, and half or twice as large."""
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
    """Return one head of self-attention [b c h w] over the pixels of queries, keys and values [b 3c h w].

    layout: of the 3c channels, `split` (q, then k, then v) or `interleaved` (q, k, v of one channel after another).
    """
    batch, features, height, width = qkv.shape
    if layout == "interleaved":
        q, k, v = qkv.reshape(batch, features // 3, 3, height * width).unbind(2)
    else:
        q, k, v = qkv.reshape(batch, 3, features // 3, height * width).unbind(1)
    scores = (q * q.shape[1] ** -0.5).transpose(-1, -2) @ k
    weights = torch.softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), dim=-1)
    return (v @ weights.to(v.dtype).transpose(-1, -2)).reshape(batch, -1, height, width)


class Block(nn.Module):
    """Residual block under the condition emb [b d], then attention if asked for; the residual stays in float32.

    first: where its dropout mask begins among those of the network.  resample: None | down | up, of images of
    `size` x `size`, before the first convolution.
    """

    remat = False

    def __init__(self, in_features, out_features, emb_features, *, first, size, attention, dropout, qkv_layout, taps,
                 dtype, resample=None):  # fmt: skip
        super().__init__()
        self.first, self.prob, self.attention, self.qkv_layout = first, dropout, attention, qkv_layout
        sampling = {"resample": resample, "taps": taps, "size": size, "dtype": dtype}
        self.norm0 = GroupNorm(in_features)
        self.conv0 = Conv(in_features, out_features, 3, **sampling)
        self.affine = Linear(emb_features, out_features, dtype=dtype)
        self.norm1 = GroupNorm(out_features)
        self.conv1 = Conv(out_features, out_features, 3, dtype=dtype, kernel_init=nearly_zero)
        if in_features != out_features or resample:
            self.skip = Conv(in_features, out_features, 1, **sampling)
        else:
            self.skip = None
        if attention:
            self.norm2 = GroupNorm(out_features)
            self.qkv = Conv(out_features, 3 * out_features, 1, dtype=dtype, kernel_init=for_attention)
            self.proj = Conv(out_features, out_features, 1, dtype=dtype, kernel_init=nearly_zero)

    @rematerialised
    def forward(self, x, emb, keep, tape=None):
        residual = x if self.skip is None else self.skip(x, tape)
        x = self.conv0(F.silu(self.norm0(x)), tape)
        x = F.silu(self.norm1(x + self.affine(emb, tape)[:, :, None, None]))
        if keep is not None:
            x = dropout(x, self.prob, keep[:, self.first : self.first + math.prod(x.shape[1:])])
        x = self.conv1(x, tape)
        x = add(residual, x) * SKIP_SCALE
        if self.attention:
            x = add(x, self.proj(attend(self.qkv(self.norm2(x), tape), self.qkv_layout), tape)) * SKIP_SCALE
        return x


def add(a, b):
    """Return a + b in float32 at least."""
    return a.to(torch.promote_types(a.dtype, torch.float32)) + b


def check_sizes(input_size, channel_mult, taps):
    """Raise UserError for options of which no U-Net can be built."""
    halvings = len(channel_mult) - 1
    if not channel_mult or input_size % 2**halvings:
        raise UserError(
            f"model.input_size {input_size} cannot be halved {max(halvings, 0)} times: model.channel_mult "
            f"{channel_mult} has one entry a level, each level half as large"
        )
    if len(taps) % 2 or not sum(taps):
        raise UserError(f"model.resample_filter {taps} must have an even number of taps, with a sum that is not 0")


class UNet(nn.Module):
    """Average velocity u = net(z, t, r, y, augment, dropout), without classes: y is ignored.

    z: [b c h w] state, h = w = input_size.  t, r: [b] times in [0, 1], r <= t, t = 1 is noise.
    augment: [b augment_dim] labels of data.augment; None: images as they are, the same as zeros.
    dropout: `dropout_masks`, in training; None: no dropout.
    Returns u [b c h w] in float32 at least.  `dtype` is that of the matmuls and convolutions.
    Raises UserError for sizes that do not divide, and for augment_dim with time_embedding separate.
    """

    takes_tape = True

    def __init__(self, *, input_size, channels, num_classes, width, channel_mult, channel_mult_emb, channel_mult_noise,
                 num_blocks, attn_resolutions, dropout, augment_dim, embedding_type, encoder_type, decoder_type,
                 resample_filter, time_embedding, qkv_layout, dtype=torch.float32):  # fmt: skip
        super().__init__()
        check_sizes(input_size, channel_mult, resample_filter)
        if time_embedding == "separate" and augment_dim:
            raise UserError("model.time_embedding separate has no place for labels: model.augment_dim must be 0")
        self.num_classes, self.dropout, self.augment_dim = num_classes, dropout, augment_dim
        self.sizes = tuple(input_size >> level for level in range(len(channel_mult)))
        self.num_blocks, self.encoder_type, self.decoder_type = num_blocks, encoder_type, decoder_type
        self.time_embedding, self.features = time_embedding, width * channel_mult_noise
        emb = width * channel_mult_emb
        self.map_noise = FourierFeatures(self.features) if embedding_type == "fourier" else None
        if time_embedding == "joint":
            self.map_layer0 = Linear(2 * self.features, emb, dtype=None)
            self.map_layer1 = Linear(emb, emb, dtype=None)
        else:
            self.map_layer0 = Linear(self.features, emb, dtype=None)
            self.map_layer1 = Linear(emb, emb // 2, dtype=None)
            self.map_layer0_s = Linear(self.features, emb, dtype=None)
            self.map_layer1_s = Linear(emb, emb // 2, dtype=None)
        if augment_dim:
            self.map_augment = Linear(augment_dim, 2 * self.features, bias=False, dtype=None)
        enc, dec, num_entries = {}, {}, 0

        def block(in_features, out_features, size, attention=False, resample=None):
            nonlocal num_entries
            first, out_size = num_entries, {None: size, "down": size // 2, "up": 2 * size}[resample]
            num_entries += out_size**2 * out_features
            return Block(
                in_features, out_features, emb, first=first, size=size, attention=attention, dropout=dropout,
                qkv_layout=qkv_layout, taps=resample_filter, dtype=dtype, resample=resample,
            )  # fmt: skip

        def conv(in_features, out_features, kernel_size, **options):
            return Conv(in_features, out_features, kernel_size, dtype=dtype, **options)

        features, aux, skips = width, channels, []  # channels of x, of the auxiliary image, of what the decoder gets
        for level, (size, mult) in enumerate(zip(self.sizes, channel_mult, strict=True)):
            name, halved = f"{size}x{size}", {"resample": "down", "taps": resample_filter, "size": 2 * size}
            if level == 0:
                enc[f"{name}_conv"] = conv(channels, width, 3)
            else:
                enc[f"{name}_down"] = block(features, features, 2 * size, resample="down")
            skips.append(features)
            if level and encoder_type == "skip":
                enc[f"{name}_aux_down"] = conv(aux, aux, 0, **halved)
                enc[f"{name}_aux_skip"] = conv(aux, features, 1)
            if level and encoder_type == "residual":
                enc[f"{name}_aux_residual"] = conv(aux, features, 3, filter_last=True, **halved)
                aux = features
            for i in range(num_blocks):
                enc[f"{name}_block{i}"] = block(features, width * mult, size, size in attn_resolutions)
                features = width * mult
                skips.append(features)
        for size, mult in reversed(list(zip(self.sizes, channel_mult, strict=True))):
            name, lowest = f"{size}x{size}", size == self.sizes[-1]
            if lowest:
                dec[f"{name}_in0"] = block(features, features, size, attention=True)
                dec[f"{name}_in1"] = block(features, features, size)
            else:
                dec[f"{name}_up"] = block(features, features, size // 2, resample="up")
            for i in range(num_blocks + 1):
                attention = i == num_blocks and size in attn_resolutions
                dec[f"{name}_block{i}"] = block(features + skips.pop(), width * mult, size, attention)
                features = width * mult
            if decoder_type == "skip" and not lowest:
                doubled = {"resample": "up", "taps": resample_filter, "size": size // 2}
                dec[f"{name}_aux_up"] = conv(channels, channels, 0, **doubled)
            if decoder_type == "skip" or size == self.sizes[0]:
                dec[f"{name}_aux_norm"] = GroupNorm(features)
                dec[f"{name}_aux_conv"] = conv(features, channels, 3, kernel_init=nearly_zero)
        self.enc, self.dec = nn.ModuleDict(enc), nn.ModuleDict(dec)
        self.num_entries = num_entries
        name_layers(self)

    @classmethod
    def from_config(cls, c):
        """Build from `config.model`."""
        return cls(
            input_size=c.input_size, channels=c.channels, num_classes=c.num_classes, width=c.width,
            channel_mult=c.channel_mult, channel_mult_emb=c.channel_mult_emb, channel_mult_noise=c.channel_mult_noise,
            num_blocks=c.num_blocks, attn_resolutions=c.attn_resolutions, dropout=c.dropout, augment_dim=c.augment_dim,
            embedding_type=c.embedding_type, encoder_type=c.encoder_type, decoder_type=c.decoder_type,
            resample_filter=c.resample_filter, time_embedding=c.time_embedding, qkv_layout=c.qkv_layout,
            dtype=getattr(torch, c.compute_dtype),
        )  # fmt: skip

    def tables(self):
        """Return the fixed tables of the canonical state dict, {name: array}; they are computed, never trained."""
        convolutions = {name: m for name, m in self.named_modules() if isinstance(m, Conv) and m.resample}
        return {f"{name}.resample_filter": filter_table(m.taps) for name, m in convolutions.items()}

    def dropout_masks(self, draws):
        """Return the masks of all blocks [b n] bool, true where an entry is kept, of uniform draws [b]."""
        return keep_masks(draws, self.num_entries, self.dropout)

    def embed_time(self, t):
        """Return the features [b features] of times t [b], sines first."""
        features = positional_features(t, self.features) if self.map_noise is None else self.map_noise(t)
        return torch.roll(features, self.features // 2, -1)

    def embed(self, t, r, augment, tape=None):
        """Return the condition [b d] of the blocks."""
        if self.time_embedding == "separate":
            t = self.map_layer1(F.silu(self.map_layer0(self.embed_time(t), tape)), tape)
            r = self.map_layer1_s(F.silu(self.map_layer0_s(self.embed_time(r), tape)), tape)
            return F.silu(torch.cat([t, r], dim=-1))
        emb = torch.cat([self.embed_time(t), self.embed_time(t - r)], dim=-1)
        if self.augment_dim:
            augment = t.new_zeros(len(t), self.augment_dim) if augment is None else augment
            emb = emb + self.map_augment(augment, tape)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb, tape)), tape))

    def encode(self, x, emb, keep, tape=None):
        """Return the lowest features and all features that the decoder is given, the last one last."""
        skips, aux = [], x
        for level, size in enumerate(self.sizes):
            name = f"{size}x{size}"
            x = self.enc[f"{name}_down"](x, emb, keep, tape=tape) if level else self.enc[f"{name}_conv"](x, tape)
            if level and self.encoder_type == "skip":
                aux = self.enc[f"{name}_aux_down"](aux)
                x = add(x, self.enc[f"{name}_aux_skip"](aux, tape))
            if level and self.encoder_type == "residual":
                x = aux = add(x, self.enc[f"{name}_aux_residual"](aux, tape)) * SKIP_SCALE
            skips.append(x)
            for i in range(self.num_blocks):
                x = self.enc[f"{name}_block{i}"](x, emb, keep, tape=tape)
                skips.append(x)
        return x, skips

    def decode(self, x, emb, keep, skips, tape=None) -> Any:
        """Return the image [b c h w]."""
        image = None
        for size in reversed(self.sizes):
            name = f"{size}x{size}"
            if size == self.sizes[-1]:
                x = self.dec[f"{name}_in0"](x, emb, keep, tape=tape)
                x = self.dec[f"{name}_in1"](x, emb, keep, tape=tape)
            else:
                x = self.dec[f"{name}_up"](x, emb, keep, tape=tape)
            for i in range(self.num_blocks + 1):
                x = self.dec[f"{name}_block{i}"](torch.cat([x, skips.pop()], dim=1), emb, keep, tape=tape)
            if self.decoder_type == "skip" and image is not None:
                image = self.dec[f"{name}_aux_up"](image)
            if self.decoder_type == "skip" or size == self.sizes[0]:
                shown = self.dec[f"{name}_aux_conv"](F.silu(self.dec[f"{name}_aux_norm"](x)), tape)
                image = shown if image is None else add(image, shown)
        return image

    def forward(self, z, t, r, y, augment=None, dropout=None, tape=None):
        emb = self.embed(t, r, augment, tape)
        x, skips = self.encode(z, emb, dropout, tape)
        x = self.decode(x, emb, dropout, skips, tape)
        return x.to(torch.promote_types(x.dtype, torch.float32))
