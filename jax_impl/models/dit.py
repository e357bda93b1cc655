"""DiT: a transformer over patches, conditioned on t, the label and, for MeanFlow, t - r, through adaLN-Zero.

Source: arXiv:2212.09748 (DiT) and arXiv:2505.13447 (MeanFlow, section 5); Gsunshine/meanflow, models/models_dit.py;
zhuyu-cs/MeanFlow, sit.py, whose state-dict names are the canonical ones (there `r_embedder` embeds t - r).  Without
t - r it is SiT, arXiv:2401.08740, with the projectors of REPA, arXiv:2410.06940, as an option; kyungmnlee/dmf,
models/sit.py.
"""

import jax.numpy as jnp
from flax import nnx

from jax_impl.models.attention import Attention
from jax_impl.models.layers import (
    LabelEmbedder,
    Linear,
    PatchEmbed,
    TimestepEmbedder,
    layer_norm,
    modulate,
    unpatchify,
)
from jax_impl.models.tape import in_turn, name_layers, rematerialised
from meanflow.tables import position_table


class Mlp(nnx.Module):
    """Two-layer MLP over tokens with the tanh-approximate GELU."""

    def __init__(self, width, hidden, *, dtype):
        self.fc1 = Linear(width, hidden, dtype=dtype)
        self.fc2 = Linear(hidden, width, dtype=dtype)

    def __call__(self, x, tape=None):
        return self.fc2(nnx.gelu(self.fc1(x, tape), approximate=True), tape)


class Block(nnx.Module):
    """Attention and MLP, each modulated and gated by c [b d], SiLU of the condition; the residual stays in float32."""

    remat = False

    def __init__(self, width, num_heads, mlp_ratio, *, qk_norm, kernels, dtype):
        self.attn = Attention(width, num_heads, qk_norm=qk_norm, kernels=kernels, dtype=dtype)
        self.mlp = Mlp(width, int(width * mlp_ratio), dtype=dtype)
        self.adaLN_modulation = nnx.Dict({"1": Linear(width, 6 * width, dtype=dtype)})

    @rematerialised
    def __call__(self, x, c, tape=None):
        modulation = self.adaLN_modulation["1"](c, tape)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
        x = x + gate_a[:, None] * self.attn(modulate(layer_norm(x), shift_a, scale_a), tape)
        x = x + gate_m[:, None] * self.mlp(modulate(layer_norm(x), shift_m, scale_m), tape)
        return x


class FinalLayer(nnx.Module):
    """Map tokens [b n d] to patches [b n p*p*c], modulated by c like a block."""

    def __init__(self, width, out_features, *, dtype):
        self.linear = Linear(width, out_features, dtype=dtype)
        self.adaLN_modulation = nnx.Dict({"1": Linear(width, 2 * width, dtype=dtype)})

    def __call__(self, x, c, tape=None):
        shift, scale = jnp.split(self.adaLN_modulation["1"](c, tape), 2, axis=-1)
        return self.linear(modulate(layer_norm(x), shift, scale), tape)


class Projector(nnx.Module):
    """Map tokens [b n d] to an encoder's features [b n out] with a three-layer MLP."""

    def __init__(self, width, hidden, out_features, *, dtype):
        sizes = {"0": (width, hidden), "2": (hidden, hidden), "4": (hidden, out_features)}
        for name, (in_features, out) in sizes.items():
            setattr(self, name, Linear(in_features, out, dtype=dtype))

    def __call__(self, x):
        first, second, last = (getattr(self, name) for name in ("0", "2", "4"))
        x = last(nnx.silu(second(nnx.silu(first(x)))))
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class DiT(nnx.Module):
    """Average velocity u = net(z, t, r, y), or velocity v of a flow model.  No dropout, no augmentation labels.

    z: [b h w c] state, h = w = input_size.  t, r: [b] times in [0, 1], r <= t, t = 1 is noise; a flow model, without
    interval_embedder, ignores r.  y: [b] int labels in [0, num_classes]; num_classes is the null class.
    tape: see `Tape`.  Returns u [b h w c] in float32 at least, and if
    `features`, also a tuple of [b n dim] for each of repa_dims: what the projectors make of the tokens after repa_depth
    blocks.  `dtype` is that of the matmuls; kernels, qk_norm: see `Attention`.
    Raises ValueError for sizes that do not divide.
    """

    takes_tape = True

    def __init__(self, *, input_size, channels, num_classes, patch_size, depth, width, num_heads, mlp_ratio=4.0,
                 qk_norm=False, kernels=("plain", "plain"), interval_embedder=True, repa_dims=(), repa_depth=8,
                 projector_dim=2048, dtype=jnp.float32):  # fmt: skip
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is not a multiple of patch_size {patch_size}")
        if width % num_heads or width % 4:
            raise ValueError(f"width {width} must be a multiple of num_heads {num_heads} and of 4")
        self.num_classes, self.channels = num_classes, channels
        self.grid_size, self.width = input_size // patch_size, width
        self.interval_embedder, self.repa_depth = interval_embedder, repa_depth
        self.x_embedder = PatchEmbed(patch_size, channels, width, dtype=dtype)
        self.t_embedder = TimestepEmbedder(width)
        if interval_embedder:
            self.r_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        options = {"qk_norm": qk_norm, "kernels": kernels, "dtype": dtype}
        self.blocks = nnx.List([Block(width, num_heads, mlp_ratio, **options) for _ in range(depth)])
        self.projectors = nnx.List([Projector(width, projector_dim, dim, dtype=dtype) for dim in repa_dims])
        self.final_layer = FinalLayer(width, patch_size**2 * channels, dtype=dtype)
        name_layers(self)

    @classmethod
    def from_config(cls, c):
        """Build from `config.model`."""
        repa = {}
        if "repa_dims" in c:  # of flow models
            repa = {"repa_dims": c.repa_dims, "repa_depth": c.repa_depth, "projector_dim": c.projector_dim}
        return cls(**sizes_of(c), interval_embedder=c.interval_embedder, **repa)

    def tables(self):
        """Return the fixed tables of the canonical state dict, {name: array}; they are computed, never trained."""
        return {"pos_embed": position_table(self.grid_size, self.width)[None]}

    def __call__(self, z, t, r, y, tape=None, features=False):
        c = self.t_embedder(t, tape)
        if self.interval_embedder:
            c = c + self.r_embedder(t - r, tape)
        c = c + self.y_embedder(y)
        u, tokens = self.transform(z, [nnx.silu(c)] * (len(self.blocks) + 1), tape)
        return (u, tuple(projector(tokens) for projector in self.projectors)) if features else u

    def transform(self, z, conditions, tape):
        """Return the velocity [b h w c] and the tokens [b n width] after repa_depth blocks.

        conditions: [b width] for each block and one for the final layer, after SiLU, which runs once and not per block.
        """
        x = self.x_embedder(z, tape)
        x = tokens = x + self.tables()["pos_embed"]
        for i, (block, enter) in enumerate(in_turn(self.blocks, tape)):
            x = block(enter(x), conditions[i], tape=tape)
            tokens = x if i + 1 == self.repa_depth else tokens
        x = unpatchify(self.final_layer(x, conditions[-1], tape), self.channels)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)), tokens


def sizes_of(c):
    """Return the arguments that all kinds of DiT share, from `config.model`."""
    return {
        "input_size": c.input_size, "channels": c.channels, "num_classes": c.num_classes, "patch_size": c.patch_size,
        "depth": c.depth, "width": c.width, "num_heads": c.num_heads, "mlp_ratio": c.mlp_ratio, "qk_norm": c.qk_norm,
        "kernels": (c.attention, c.attention_jvp), "dtype": jnp.dtype(c.compute_dtype),
    }  # fmt: skip
