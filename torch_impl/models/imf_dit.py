"""The transformer of improved MeanFlow: conditions as prefix tokens, a trunk, and one head each for u and v.

Source: arXiv:2512.02012; Lyy-iiis/imeanflow, models/imfDiT.py, whose state-dict names are canonical,
including the wrappers `_flax_linear` and `_flax_embedding`, without the prefix `net.` of the class around the network.
"""

import torch
import torch.nn.functional as F
from torch import nn

from meanflow.tables import rotary_table
from torch_impl.models import layers
from torch_impl.models.attention import attend
from torch_impl.models.layers import PatchEmbed, embedding, rms_norm, timestep_features, unpatchify
from torch_impl.models.tape import name_layers, rematerialised, under_jvp


class Linear(nn.Module):
    """A linear layer under the name that the official code gives it."""

    def __init__(self, in_features, out_features, *, dtype, bias=False):
        super().__init__()
        self._flax_linear = layers.Linear(in_features, out_features, dtype=dtype, bias=bias)

    def forward(self, x, tape=None):
        return self._flax_linear(x, tape)


class RMSNorm(nn.Module):
    """RMS-normalise the last axis and scale it; in float32 at least."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return rms_norm(x) * self.weight


class Embedder(nn.Module):
    """Embed numbers [b] into vectors [b width]: sinusoidal features, then a two-layer MLP in float32."""

    def __init__(self, width, *, features=256):
        super().__init__()
        self.features = features
        self.mlp = nn.ModuleDict(
            {
                "0": Linear(features, width, dtype=None, bias=True),
                "2": Linear(width, width, dtype=None, bias=True),
            }
        )

    def forward(self, a, tape=None):
        x = timestep_features(a, self.features)
        return self.mlp["2"](F.silu(self.mlp["0"](x, tape)), tape)


class ClassEmbedder(nn.Module):
    """Embed labels [b] in [0, num_classes] into vectors [b width]; the last row is the null class."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.embedding_table = nn.ModuleDict({"_flax_embedding": embedding(num_classes + 1, width)})

    def forward(self, y):
        return self.embedding_table["_flax_embedding"](y)


def rotate(x, cos, sin):
    """Rotate adjacent channels of x [b heads n d] by the angles of cos, sin [n, d/2]: rotary positions.

    In real arithmetic, which supports gradients and JVPs: the official PyTorch code reinterprets pairs as complex
    numbers, which does not.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).reshape(x.shape)


class RotaryAttention(nn.Module):
    """Multi-head self-attention over tokens x [b n d]; queries and keys RMS-normalised per head, then rotated."""

    def __init__(self, width, num_heads, *, kernels=("plain", "plain"), dtype):
        super().__init__()
        self.num_heads, self.kernels = num_heads, kernels
        self.q_proj = Linear(width, width, dtype=dtype)
        self.k_proj = Linear(width, width, dtype=dtype)
        self.v_proj = Linear(width, width, dtype=dtype)
        self.q_norm = RMSNorm(width // num_heads)
        self.k_norm = RMSNorm(width // num_heads)
        self.out_proj = Linear(width, width, dtype=dtype)

    def forward(self, x, cos, sin, tape=None):
        batch, tokens, width = x.shape
        q, k, v = (
            proj(x, tape).reshape(batch, tokens, self.num_heads, -1).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        kernel = self.kernels[int(under_jvp(tape))]  # torch 2.11 compiles no bool index
        x = attend(q.to(v.dtype), k.to(v.dtype), v, kernel)
        return self.out_proj(x.transpose(1, 2).reshape(batch, tokens, width), tape)


class SwiGLU(nn.Module):
    """Gated MLP over tokens: w2(silu(w1 x) w3 x)."""

    def __init__(self, width, hidden, *, dtype):
        super().__init__()
        self.w1 = Linear(width, hidden, dtype=dtype)
        self.w3 = Linear(width, hidden, dtype=dtype)
        self.w2 = Linear(hidden, width, dtype=dtype)

    def forward(self, x, tape=None):
        return self.w2(F.silu(self.w1(x, tape)) * self.w3(x, tape), tape)


class RotaryBlock(nn.Module):
    """Attention and MLP, each after RMSNorm and scaled by a vector; the residual stays in float32."""

    remat = False

    def __init__(self, width, num_heads, mlp_ratio, *, kernels, dtype):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = RotaryAttention(width, num_heads, kernels=kernels, dtype=dtype)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, int(width * mlp_ratio), dtype=dtype)
        self.attn_scale = nn.Parameter(torch.zeros(width))
        self.mlp_scale = nn.Parameter(torch.zeros(width))

    @rematerialised
    def forward(self, x, cos, sin, tape=None):
        x = x + self.attn_scale * self.attn(self.norm1(x), cos, sin, tape)
        x = x + self.mlp_scale * self.mlp(self.norm2(x), tape)
        return x


class NormedLayer(nn.Module):
    """Map tokens [b n d] to patches [b n p*p*c]."""

    def __init__(self, width, out_features, *, dtype):
        super().__init__()
        self.norm = RMSNorm(width)
        self.linear = Linear(width, out_features, dtype=dtype, bias=True)

    def forward(self, x, tape=None):
        return self.linear(self.norm(x), tape)


class IMFDiT(nn.Module):
    """Average velocity u and instantaneous velocity v, conditioned on a guidance scale and interval.

    z: [b c h w] state, h = w = input_size.  t, r: [b] times in [0, 1], r <= t, t = 1 is noise; only t - r is used.
    y: [b] int labels in [0, num_classes]; num_classes is the null class.  omega: [b] guidance scales, at least 1.
    t_min, t_max: [b] times between which guidance holds.  heads: `u`, `v`, or `uv` for both; the tape
    serves the first.
    Returns u or v [b c h w], or a pair of them, in float32 at least.  `dtype` is that of the matmuls.
    `depth` counts the blocks on the way to u: depth - head_depth in the trunk, then head_depth for each head.  Without
    v_heads, as in released weights, v is what the official code returns in eval mode: a final layer on the trunk, which
    is meaningless.  No dropout, no augmentation labels.  Raises ValueError for sizes that do not divide.
    """

    takes_tape = True

    def __init__(self, *, input_size, channels, num_classes, patch_size, depth, head_depth, width, num_heads,
                 mlp_ratio, num_tokens, v_heads=True, kernels=("plain", "plain"),
                 dtype=torch.float32):  # fmt: skip
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is not a multiple of patch_size {patch_size}")
        if width % (2 * num_heads) or head_depth > depth:
            raise ValueError(f"width {width} must be a multiple of 2 num_heads {num_heads}, head_depth at most depth")
        self.num_classes, self.channels = num_classes, channels
        num_class, num_omega, num_interval, num_time = num_tokens
        self.prefix = num_class + num_omega + 2 * num_interval + num_time
        self.rope_shape = (self.prefix + (input_size // patch_size) ** 2, width // num_heads)

        def tokens(num):
            return nn.Parameter(torch.zeros(num, width))

        def blocks(num):
            options = {"kernels": kernels, "dtype": dtype}
            return nn.ModuleList([RotaryBlock(width, num_heads, mlp_ratio, **options) for _ in range(num)])

        self.time_tokens, self.class_tokens, self.omega_tokens = tokens(num_time), tokens(num_class), tokens(num_omega)
        self.t_min_tokens, self.t_max_tokens = tokens(num_interval), tokens(num_interval)
        self.x_embedder = PatchEmbed(patch_size, channels, width, dtype=dtype)
        self.h_embedder = Embedder(width)
        self.omega_embedder = Embedder(width)
        self.cfg_t_start_embedder = Embedder(width)
        self.cfg_t_end_embedder = Embedder(width)
        self.y_embedder = ClassEmbedder(num_classes, width)
        self.shared_blocks = blocks(depth - head_depth)
        self.u_heads = blocks(head_depth)
        self.v_heads = blocks(head_depth if v_heads else 0)
        self.u_final_layer = NormedLayer(width, patch_size**2 * channels, dtype=dtype)
        self.v_final_layer = NormedLayer(width, patch_size**2 * channels, dtype=dtype)
        for name, table in zip(("cos", "sin"), rotary_table(*self.rope_shape), strict=True):
            self.register_buffer(name, torch.from_numpy(table), persistent=False)
        name_layers(self)

    @classmethod
    def from_config(cls, c):
        """Build from `config.model`."""
        return cls(
            input_size=c.input_size, channels=c.channels, num_classes=c.num_classes, patch_size=c.patch_size,
            depth=c.depth, head_depth=c.head_depth, width=c.width, num_heads=c.num_heads, mlp_ratio=c.mlp_ratio,
            num_tokens=(c.num_class_tokens, c.num_omega_tokens, c.num_interval_tokens, c.num_time_tokens),
            v_heads=c.v_heads, kernels=(c.attention, c.attention_jvp), dtype=getattr(torch, c.compute_dtype),
        )  # fmt: skip

    def tables(self):
        """Return the fixed tables of the canonical state dict: none, as the rotary table is not in it."""
        return {}

    def forward(self, z, t, r, y, omega, t_min, t_max, heads="u", tape=None):
        x = torch.cat([self.prefix_tokens(t - r, y, omega, t_min, t_max, tape), self.x_embedder(z, tape)], dim=1)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        for block in self.shared_blocks:
            x = block(x, cos, sin, tape=tape)
        velocities = tuple(self.velocity(head, x, cos, sin, tape if head == heads[0] else None) for head in heads)
        return velocities if len(heads) > 1 else velocities[0]

    def prefix_tokens(self, h, y, omega, t_min, t_max, tape=None):
        """Return the prefix tokens [b n width]: learnt tokens plus the embeddings of the conditions."""
        carried = (
            (self.class_tokens, self.y_embedder(y)),
            (self.omega_tokens, self.omega_embedder(1 - 1 / omega, tape)),
            (self.t_min_tokens, self.cfg_t_start_embedder(t_min, tape)),
            (self.t_max_tokens, self.cfg_t_end_embedder(t_max, tape)),
            (self.time_tokens, self.h_embedder(h, tape)),
        )
        return torch.cat([tokens + embedding[:, None] for tokens, embedding in carried], dim=1)

    def velocity(self, head, x, cos, sin, tape=None):
        """Return the velocity [b c h w] that the head `u` or `v` predicts from the trunk's tokens x [b n width]."""
        blocks, final_layer = {"u": (self.u_heads, self.u_final_layer), "v": (self.v_heads, self.v_final_layer)}[head]
        for block in blocks:
            x = block(x, cos, sin, tape=tape)
        x = unpatchify(final_layer(x[:, self.prefix :], tape), self.channels)
        return x.to(torch.promote_types(x.dtype, torch.float32))
