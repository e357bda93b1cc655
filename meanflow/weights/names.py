"""Translates names between official Flax trees and canonical weights, in both directions, with one rule per system.

Source: Gsunshine/meanflow and Lyy-iiis/imeanflow, models/torch_models.py, whose wrappers `_flax_linear` and
`_flax_embedding` and numbered modules appear in the checkpoints.  The canonical names of improved MeanFlow, which are
those of its official PyTorch checkpoints, keep the wrappers; those of MeanFlow do not, and its `h_embedder`, which
embeds t - r, is the canonical `r_embedder`.  Stable Diffusion's autoencoder: diffusers 0.29, models/vae_flax.py.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from meanflow.errors import UserError
from meanflow.weights import unknown

EMBEDDINGS = {"y_embedder.embedding_table", "y_embedder.embedding_table._flax_embedding"}
TABLES = {"pos_embed"}  # the official Flax network computes it; canonical weights contain it
MEANFLOW = re.compile(
    r"(x_embedder\.proj|[tr]_embedder\.mlp\.[02]|final_layer\.(linear|adaLN_modulation\.1)"
    r"|blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12]|adaLN_modulation\.1))\.(weight|bias)"
    r"|y_embedder\.embedding_table\.weight"
)
IMPROVED = re.compile(
    r"(time|class|omega|t_min|t_max)_tokens|x_embedder\.proj\.(weight|bias)"
    r"|(h|omega|cfg_t_start|cfg_t_end)_embedder\.mlp\.[02]\._flax_linear\.(weight|bias)"
    r"|y_embedder\.embedding_table\._flax_embedding\.weight"
    r"|(shared_blocks|[uv]_heads)\.\d+\.((attn|mlp)_scale|(norm[12]|attn\.[qk]_norm)\.weight"
    r"|(attn\.([qkv]|out)_proj|mlp\.w[123])\._flax_linear\.weight)"
    r"|[uv]_final_layer\.(norm\.weight|linear\._flax_linear\.(weight|bias))"
)
AUTOENCODER = re.compile(
    r"((en|de)coder\.((conv_in|conv_norm_out|conv_out)|(down|up)_blocks\.\d+\.(down|up)samplers\.0\.conv"
    r"|(mid_block|(down|up)_blocks\.\d+)\.resnets\.\d+\.(norm[12]|conv[12]|conv_shortcut)"
    r"|mid_block\.attentions\.0\.(group_norm|to_[qkv]|to_out\.0))|(post_)?quant_conv)\.(weight|bias)"
)
ATTENTION = {"query": ["to_q"], "key": ["to_k"], "value": ["to_v"], "proj_attn": ["to_out", "0"]}


class Rule(NamedTuple):
    """The naming rule of one system.  Modules are the parts of a dotted name, without its last part."""

    canonical: re.Pattern  # every canonical name
    to_canonical: Callable[[list[str]], list[str]]  # from the modules of a Flax path
    to_flax: Callable[[list[str]], list[str]]  # its inverse
    root: tuple[str, ...] = ("net",)  # the beginning of every Flax path
    norms: re.Pattern = re.compile(r"(?!)")  # canonical modules whose weight is called `scale`, not `kernel`


def meanflow_to_canonical(modules: list[str]) -> list[str]:
    """Drop wrappers and the `layers_` before numbers; h_embedder becomes r_embedder."""
    modules = [m.removeprefix("layers_") for m in modules if m not in ("_flax_linear", "_flax_embedding")]
    return ["r_embedder" if m == "h_embedder" else m for m in modules]


def meanflow_to_flax(modules: list[str]) -> list[str]:
    """Put them back: all modules but convolutions are wrapped."""
    name = ".".join(modules)
    wrapper = "_flax_embedding" if name in EMBEDDINGS else "_flax_linear"
    modules = [f"layers_{m}" if m.isdigit() else m for m in modules]
    return ["h_embedder" if m == "r_embedder" else m for m in modules] + (
        [] if name == "x_embedder.proj" else [wrapper]
    )


def improved_to_canonical(modules: list[str]) -> list[str]:
    """Separate names and numbers: layers_0 -> 0, u_heads_3 -> u_heads, 3."""
    parts = []
    for m in modules:
        numbered = re.fullmatch(r"(layers|shared_blocks|[uv]_heads)_(\d+)", m)
        parts += [m] if numbered is None else [p for p in numbered.groups() if p != "layers"]
    return parts


def improved_to_flax(modules: list[str]) -> list[str]:
    """Join them again: in an MLP a number is a layer, elsewhere it belongs to the preceding name."""
    parts: list[str] = []
    for m in modules:
        if m.isdigit():
            parts.append(f"layers_{m}" if parts[-1] == "mlp" else f"{parts.pop()}_{m}")
        else:
            parts.append(m)
    return parts


def autoencoder_to_canonical(modules: list[str]) -> list[str]:
    """Separate names and numbers: down_blocks_0 -> down_blocks, 0; attention gets its current names."""
    parts = []
    for m in modules:
        numbered = re.fullmatch(r"((?:down|up)_blocks|resnets|attentions|(?:down|up)samplers)_(\d+)", m)
        parts += ATTENTION.get(m, [m]) if numbered is None else list(numbered.groups())
    return parts


def autoencoder_to_flax(modules: list[str]) -> list[str]:
    """Join them again."""
    name = ".".join(modules)
    for flax, parts in ATTENTION.items():
        name = re.sub(rf"\b{re.escape('.'.join(parts))}$", flax, name)
    return re.sub(r"\.(\d+)", r"_\1", name).split(".")


RULES = {
    "meanflow": Rule(MEANFLOW, meanflow_to_canonical, meanflow_to_flax),
    "improved": Rule(IMPROVED, improved_to_canonical, improved_to_flax),
    "autoencoder": Rule(
        AUTOENCODER,
        autoencoder_to_canonical,
        autoencoder_to_flax,
        root=(),
        norms=re.compile(r".*\.(norm[12]|group_norm|conv_norm_out)"),
    ),
}


def system_of(names) -> str:
    """Return the system, a key of `RULES`, that Flax paths or canonical names belong to."""
    if any(re.match(r"(en|de)coder[./]conv_in", name) for name in names):
        return "autoencoder"
    return "improved" if any("omega_" in name for name in names) else "meanflow"


def flax_tree_to_canonical(flat: dict[str, np.ndarray], consume: bool = False) -> dict[str, np.ndarray]:
    """Return canonical weights {name: array} of a flat official tree {'net/x_embedder/proj/kernel': array}.

    Bitwise: kernels [... in out] are transposed to [out in ...], other arrays are unchanged.  The fixed table
    `pos_embed` is not in Flax trees, so it is not in the result.  consume: remove each array from `flat` once it is
    turned, so that memory never holds all of them twice.  Raises UserError for an unknown name.
    """
    weights, system, names = {}, system_of(flat), list(flat)
    for name in names:
        array = flat.pop(name) if consume else flat[name]
        is_kernel = name.endswith("/kernel")
        try:
            canonical = canonical_name(name, system)
        except UserError as error:
            raise UserError("; ".join(filter(None, (str(error), unknown.describe(names))))) from error
        weights[canonical] = np.ascontiguousarray(to_torch(array)) if is_kernel else np.asarray(array)
    return weights


def canonical_to_flax_tree(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the flat official tree of canonical weights, the inverse of `flax_tree_to_canonical`.

    The fixed table `pos_embed` is left out.  Raises UserError for an unknown name.
    """
    flat, system = {}, system_of(weights)
    for name, array in weights.items():
        if name not in TABLES:
            path = flax_name(name, system)
            flat[path] = np.ascontiguousarray(to_flax(array)) if path.endswith("/kernel") else np.asarray(array)
    return flat


def canonical_name(name: str, system: str = "meanflow") -> str:
    """Return the canonical name of an official Flax path.  Raises UserError if there is none."""
    rule = RULES[system]
    *modules, leaf = name.removeprefix("net/").split("/")
    leaf = {"kernel": "weight", "embedding": "weight", "scale": "weight"}.get(leaf, leaf)
    canonical = ".".join([*rule.to_canonical(modules), leaf])
    known = rule.canonical.fullmatch(canonical)
    if not known or flax_name(canonical, system).removeprefix("net/") != name.removeprefix("net/"):
        raise UserError(f"{name!r} is not a parameter of the official Flax network that this converter knows")
    return canonical


def flax_name(name: str, system: str = "meanflow") -> str:
    """Return the official Flax path of a canonical name.  Raises UserError if there is none."""
    rule = RULES[system]
    if not rule.canonical.fullmatch(name):
        raise UserError(f"{name!r} is not a canonical parameter that this converter knows")
    *modules, leaf = name.split(".")
    if leaf == "weight":
        module = ".".join(modules)
        leaf = "embedding" if module in EMBEDDINGS else "scale" if rule.norms.fullmatch(module) else "kernel"
    return "/".join([*rule.root, *rule.to_flax(modules), leaf])


def to_torch(kernel: np.ndarray) -> np.ndarray:
    """Return a kernel [... in out] as a weight [out in ...]; a scale [n] as it is."""
    if kernel.ndim == 1:
        return kernel
    return kernel.transpose(kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2))


def to_flax(weight: np.ndarray) -> np.ndarray:
    """Return a weight [out in ...] as a kernel [... in out]; a scale [n] as it is."""
    return weight if weight.ndim == 1 else weight.transpose(*range(2, weight.ndim), 1, 0)
