"""DiT for MeanFlow: a transformer over patches, conditioned on t, t - r and the label through adaLN-Zero.

Source: arXiv:2212.09748 (DiT) and arXiv:2505.13447 (MeanFlow, section 5); Gsunshine/meanflow, models/models_dit.py;
zhuyu-cs/MeanFlow, sit.py, whose state-dict names are the canonical ones (there `r_embedder` embeds t - r).
"""

import jax.numpy as jnp
from flax import nnx

from jax_impl.models.attention import Attention
from jax_impl.models.layers import (
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    layer_norm,
    linear,
    modulate,
    position_table,
    unpatchify,
    zeros,
)


class Mlp(nnx.Module):
    """Two-layer MLP over tokens with the tanh-approximate GELU."""

    def __init__(self, width, hidden, *, dtype, rngs):
        self.fc1 = linear(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.fc2(nnx.gelu(self.fc1(x), approximate=True))


class Block(nnx.Module):
    """Attention and MLP, each modulated and gated by the condition c [b d]; the residual stays in float32."""

    def __init__(self, width, num_heads, mlp_ratio, *, dtype, rngs):
        self.attn = Attention(width, num_heads, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(width, int(width * mlp_ratio), dtype=dtype, rngs=rngs)
        self.adaLN_modulation = nnx.Dict({"1": linear(width, 6 * width, dtype=dtype, kernel_init=zeros, rngs=rngs)})

    def __call__(self, x, c):
        modulation = self.adaLN_modulation["1"](nnx.silu(c))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
        x = x + gate_a[:, None] * self.attn(modulate(layer_norm(x), shift_a, scale_a))
        x = x + gate_m[:, None] * self.mlp(modulate(layer_norm(x), shift_m, scale_m))
        return x


class FinalLayer(nnx.Module):
    """Map tokens [b n d] to patches [b n p*p*c]; zero at initialisation."""

    def __init__(self, width, out_features, *, dtype, rngs):
        self.linear = linear(width, out_features, dtype=dtype, kernel_init=zeros, rngs=rngs)
        self.adaLN_modulation = nnx.Dict({"1": linear(width, 2 * width, dtype=dtype, kernel_init=zeros, rngs=rngs)})

    def __call__(self, x, c):
        shift, scale = jnp.split(self.adaLN_modulation["1"](nnx.silu(c)), 2, axis=-1)
        return self.linear(modulate(layer_norm(x), shift, scale))


class DiT(nnx.Module):
    """Average velocity u = net(z, t, r, y).  It has no dropout and is told of no augmentation.

    z: [b h w c] state, h = w = input_size.  t, r: [b] times in [0, 1], r <= t, t = 1 is noise.
    y: [b] int labels in [0, num_classes]; num_classes is the null class.  Returns u [b h w c] in float32 at least.
    `dtype` is that of the matmuls.  Raises ValueError for sizes that do not divide.
    """

    dropout, augment_dim = 0.0, 0

    def __init__(self, *, input_size, channels, num_classes, patch_size, depth, width, num_heads, mlp_ratio=4.0,
                 dtype=jnp.float32, rngs):  # fmt: skip
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is not a multiple of patch_size {patch_size}")
        if width % num_heads or width % 4:
            raise ValueError(f"width {width} must be a multiple of num_heads {num_heads} and of 4")
        self.num_classes, self.channels = num_classes, channels
        self.grid_size, self.width = input_size // patch_size, width
        self.x_embedder = PatchEmbed(patch_size, channels, width, dtype=dtype, rngs=rngs)
        self.t_embedder = TimestepEmbedder(width, rngs=rngs)
        self.r_embedder = TimestepEmbedder(width, rngs=rngs)
        self.y_embedder = LabelEmbedder(num_classes, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, num_heads, mlp_ratio, dtype=dtype, rngs=rngs) for _ in range(depth)])
        self.final_layer = FinalLayer(width, patch_size**2 * channels, dtype=dtype, rngs=rngs)

    @classmethod
    def from_config(cls, c, rngs):
        """Build from `config.model`."""
        return cls(
            input_size=c.input_size, channels=c.channels, num_classes=c.num_classes, patch_size=c.patch_size,
            depth=c.depth, width=c.width, num_heads=c.num_heads, mlp_ratio=c.mlp_ratio,
            dtype=jnp.dtype(c.compute_dtype), rngs=rngs,
        )  # fmt: skip

    def tables(self):
        """Return the fixed tables of the canonical state dict, {name: array}; they are computed, never trained."""
        return {"pos_embed": position_table(self.grid_size, self.width)[None]}

    def __call__(self, z, t, r, y):
        c = self.t_embedder(t) + self.r_embedder(t - r) + self.y_embedder(y)
        x = self.x_embedder(z)
        x = x + self.tables()["pos_embed"]
        for block in self.blocks:
            x = block(x, c)
        x = unpatchify(self.final_layer(x, c), self.channels)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))
