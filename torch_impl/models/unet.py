"""U-Net for MeanFlow on pixels: EDM's SongUNet, conditioned on two times and augmentation labels.

Source: arXiv:2011.13456 (DDPM++ and NCSN++), arXiv:2206.00364 (EDM), arXiv:2505.13447 (MeanFlow, appendix A).
Two published variants are settings of this network: Gsunshine/py-meanflow, models/unet.py (time_embedding joint,
qkv_layout split, filter 1-3-3-1) and zhuyu-cs/MeanFlow, branch cifar10, unet.py (separate, interleaved, 1-1).  State
dicts of both have the canonical names.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from meanflow.errors import UserError
from meanflow.tables import filter_table
from torch_impl.models.layers import Linear
from torch_impl.models.pixels import (
    Conv,
    FourierFeatures,
    GroupNorm,
    add,
    attend,
    dropout,
    keep_masks,
    positional_features,
)
from torch_impl.models.tape import name_layers, rematerialised

SKIP_SCALE = math.sqrt(0.5)  # keeps the variance of a sum of two


class Block(nn.Module):
    """Residual block conditioned on emb [b d], with optional attention; the residual stays in float32.

    first: offset of its dropout mask in the network's.  resample: None | down | up, for images of `size` x `size`,
    before the first convolution.
    """

    remat = False

    def __init__(self, in_features, out_features, emb_features, *, first, size, attention, dropout, qkv_layout, taps,
                 dtype, resample=None):  # fmt: skip
        super().__init__()
        self.first, self.prob, self.attention, self.qkv_layout = first, dropout, attention, qkv_layout
        sampling = {"resample": resample, "taps": taps, "size": size, "dtype": dtype}
        self.norm0 = group_norm(in_features)
        self.conv0 = Conv(in_features, out_features, 3, **sampling)
        self.affine = Linear(emb_features, out_features, dtype=dtype)
        self.norm1 = group_norm(out_features)
        self.conv1 = Conv(out_features, out_features, 3, dtype=dtype)
        if in_features != out_features or resample:
            self.skip = Conv(in_features, out_features, 1, **sampling)
        else:
            self.skip = None
        if attention:
            self.norm2 = group_norm(out_features)
            self.qkv = Conv(out_features, 3 * out_features, 1, dtype=dtype)
            self.proj = Conv(out_features, out_features, 1, dtype=dtype)

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


def group_norm(features):
    """Return a norm of groups of at least 4 channels, at most 32 groups.  Raises UserError if they do not divide."""
    groups = min(32, features // 4)
    if not groups or features % groups:
        raise UserError(
            f"{features} channels cannot be normalised in groups: model.width must be a multiple of 4, and of 32 "
            "where a block sees more than 128 channels"
        )
    return GroupNorm(features, groups)


def check_sizes(input_size, channel_mult, taps):
    """Raise UserError for options that no U-Net can be built from."""
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
    augment: [b augment_dim] labels of data.augment; None means unaugmented images, as zeros do.
    dropout: `dropout_masks` in training; None means no dropout.
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
        self.add_embedding(width * channel_mult_emb, embedding_type)
        self.num_entries, widths = 0, [width * mult for mult in channel_mult]

        def block(in_features, out_features, size, attention=False, resample=None):
            first, out_size = self.num_entries, {None: size, "down": size // 2, "up": 2 * size}[resample]
            self.num_entries += out_size**2 * out_features
            return Block(
                in_features, out_features, width * channel_mult_emb, first=first, size=size, attention=attention,
                dropout=dropout, qkv_layout=qkv_layout, taps=resample_filter, dtype=dtype, resample=resample,
            )  # fmt: skip

        def conv(in_features, out_features, kernel_size, **options):
            return Conv(in_features, out_features, kernel_size, taps=resample_filter, dtype=dtype, **options)

        enc, features, skips = self.make_encoder(block, conv, channels, width, widths, attn_resolutions)
        dec = self.make_decoder(block, conv, channels, features, skips, widths, attn_resolutions)
        self.enc, self.dec = nn.ModuleDict(enc), nn.ModuleDict(dec)
        name_layers(self)

    def add_embedding(self, emb, embedding_type):
        """Create the layers that embed times and augmentation labels into [b emb]."""
        self.map_noise = FourierFeatures(self.features) if embedding_type == "fourier" else None
        if self.time_embedding == "joint":
            self.map_layer0 = Linear(2 * self.features, emb, dtype=None)
            self.map_layer1 = Linear(emb, emb, dtype=None)
        else:
            self.map_layer0 = Linear(self.features, emb, dtype=None)
            self.map_layer1 = Linear(emb, emb // 2, dtype=None)
            self.map_layer0_s = Linear(self.features, emb, dtype=None)
            self.map_layer1_s = Linear(emb, emb // 2, dtype=None)
        if self.augment_dim:
            self.map_augment = Linear(self.augment_dim, 2 * self.features, bias=False, dtype=None)

    def make_encoder(self, block, conv, channels, features, widths, attn_resolutions):
        """Return the encoder's layers by name, the channels it ends with, and those of each skip connection.

        features: channels after the first convolution.  widths: channels of each level.
        """
        enc, aux, skips = {}, channels, []  # aux: channels of the auxiliary image
        for level, (size, width) in enumerate(zip(self.sizes, widths, strict=True)):
            name, halved = f"{size}x{size}", {"resample": "down", "size": 2 * size}
            if level == 0:
                enc[f"{name}_conv"] = conv(channels, features, 3)
            else:
                enc[f"{name}_down"] = block(features, features, 2 * size, resample="down")
            skips.append(features)
            if level and self.encoder_type == "skip":
                enc[f"{name}_aux_down"] = conv(aux, aux, 0, **halved)
                enc[f"{name}_aux_skip"] = conv(aux, features, 1)
            if level and self.encoder_type == "residual":
                enc[f"{name}_aux_residual"] = conv(aux, features, 3, filter_last=True, **halved)
                aux = features
            for i in range(self.num_blocks):
                enc[f"{name}_block{i}"] = block(features, width, size, size in attn_resolutions)
                features = width
                skips.append(features)
        return enc, features, skips

    def make_decoder(self, block, conv, channels, features, skips, widths, attn_resolutions):
        """Return the decoder's layers by name; the other arguments are what `make_encoder` takes and returns."""
        dec = {}
        for size, width in reversed(list(zip(self.sizes, widths, strict=True))):
            name, lowest = f"{size}x{size}", size == self.sizes[-1]
            if lowest:
                dec[f"{name}_in0"] = block(features, features, size, attention=True)
                dec[f"{name}_in1"] = block(features, features, size)
            else:
                dec[f"{name}_up"] = block(features, features, size // 2, resample="up")
            for i in range(self.num_blocks + 1):
                attention = i == self.num_blocks and size in attn_resolutions
                dec[f"{name}_block{i}"] = block(features + skips.pop(), width, size, attention)
                features = width
            if self.decoder_type == "skip" and not lowest:
                dec[f"{name}_aux_up"] = conv(channels, channels, 0, resample="up", size=size // 2)
            if self.decoder_type == "skip" or size == self.sizes[0]:
                dec[f"{name}_aux_norm"] = group_norm(features)
                dec[f"{name}_aux_conv"] = conv(features, channels, 3)
        return dec

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
        """Return the masks of all blocks [b n] bool, true where an entry is kept, from uniform draws [b]."""
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
        """Return the lowest-resolution features and those of the skip connections, in order."""
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
