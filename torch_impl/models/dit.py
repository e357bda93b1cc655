"""DiT for MeanFlow: a transformer over patches, conditioned on t, t - r and the label through adaLN-Zero.

Source: arXiv:2212.09748 (DiT) and arXiv:2505.13447 (MeanFlow, section 5); Gsunshine/meanflow, models/models_dit.py;
zhuyu-cs/MeanFlow, sit.py, whose state-dict names are the canonical ones (there `r_embedder` embeds t - r).
"""

import torch
import torch.nn.functional as F
from torch import nn

from torch_impl.models.attention import Attention
from torch_impl.models.layers import (
    LabelEmbedder,
    Linear,
    PatchEmbed,
    TimestepEmbedder,
    layer_norm,
    modulate,
    position_table,
    unpatchify,
    zeros,
)


class Mlp(nn.Module):
    """Two-layer MLP over tokens with the tanh-approximate GELU."""

    def __init__(self, width, hidden, *, dtype):
        super().__init__()
        self.fc1 = Linear(width, hidden, dtype=dtype)
        self.fc2 = Linear(hidden, width, dtype=dtype)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by the condition c [b d]; the residual stays in float32."""

    def __init__(self, width, num_heads, mlp_ratio, *, dtype):
        super().__init__()
        self.attn = Attention(width, num_heads, dtype=dtype)
        self.mlp = Mlp(width, int(width * mlp_ratio), dtype=dtype)
        self.adaLN_modulation = nn.ModuleDict({"1": Linear(width, 6 * width, dtype=dtype, kernel_init=zeros)})

    def forward(self, x, c):
        modulation = self.adaLN_modulation["1"](F.silu(c))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        x = x + gate_a[:, None] * self.attn(modulate(layer_norm(x), shift_a, scale_a))
        x = x + gate_m[:, None] * self.mlp(modulate(layer_norm(x), shift_m, scale_m))
        return x


class FinalLayer(nn.Module):
    """Map tokens [b n d] to patches [b n p*p*c]; zero at initialisation."""

    def __init__(self, width, out_features, *, dtype):
        super().__init__()
        self.linear = Linear(width, out_features, dtype=dtype, kernel_init=zeros)
        self.adaLN_modulation = nn.ModuleDict({"1": Linear(width, 2 * width, dtype=dtype, kernel_init=zeros)})

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation["1"](F.silu(c)).chunk(2, dim=-1)
        return self.linear(modulate(layer_norm(x), shift, scale))


class DiT(nn.Module):
    """Average velocity u = net(z, t, r, y).  It has no dropout and is told of no augmentation.

    z: [b c h w] state, h = w = input_size.  t, r: [b] times in [0, 1], r <= t, t = 1 is noise.
    y: [b] int labels in [0, num_classes]; num_classes is the null class.  Returns u [b c h w] in float32 at least.
    `dtype` is that of the matmuls.  Raises ValueError for sizes that do not divide.
    """

    dropout, augment_dim = 0.0, 0

    def __init__(self, *, input_size, channels, num_classes, patch_size, depth, width, num_heads, mlp_ratio=4.0,
                 dtype=torch.float32):  # fmt: skip
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is not a multiple of patch_size {patch_size}")
        if width % num_heads or width % 4:
            raise ValueError(f"width {width} must be a multiple of num_heads {num_heads} and of 4")
        self.num_classes, self.channels = num_classes, channels
        self.grid_size, self.width = input_size // patch_size, width
        self.x_embedder = PatchEmbed(patch_size, channels, width, dtype=dtype)
        self.t_embedder = TimestepEmbedder(width)
        self.r_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.blocks = nn.ModuleList([Block(width, num_heads, mlp_ratio, dtype=dtype) for _ in range(depth)])
        self.final_layer = FinalLayer(width, patch_size**2 * channels, dtype=dtype)
        for name, table in self.tables().items():
            self.register_buffer(name, torch.from_numpy(table))

    @classmethod
    def from_config(cls, c):
        """Build from `config.model`."""
        return cls(
            input_size=c.input_size, channels=c.channels, num_classes=c.num_classes, patch_size=c.patch_size,
            depth=c.depth, width=c.width, num_heads=c.num_heads, mlp_ratio=c.mlp_ratio,
            dtype=getattr(torch, c.compute_dtype),
        )  # fmt: skip

    def tables(self):
        """Return the fixed tables of the canonical state dict, {name: array}; they are computed, never trained."""
        return {"pos_embed": position_table(self.grid_size, self.width)[None]}

    def forward(self, z, t, r, y):
        c = self.t_embedder(t) + self.r_embedder(t - r) + self.y_embedder(y)
        x = self.x_embedder(z)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        x = unpatchify(self.final_layer(x, c), self.channels)
        return x.to(torch.promote_types(x.dtype, torch.float32))
