"""The rule between the names of the official Flax trees and canonical weights, both ways.

Source: Gsunshine/meanflow, models/torch_models.py, whose wrappers `_flax_linear` and `_flax_embedding` and numbered
`layers_N` stand in its checkpoints.  Its `h_embedder` embeds t - r, as the canonical `r_embedder` does.
"""

import re

import numpy as np

from configs.errors import UserError

BOTH_WAYS = {"h_embedder": "r_embedder"}
PLAIN = {"x_embedder.proj"}  # convolutions: not wrapped
EMBEDDINGS = {"y_embedder.embedding_table"}
TABLES = {"pos_embed"}  # computed by the official Flax network, stored by the canonical one
CANONICAL = re.compile(
    r"(x_embedder\.proj|[tr]_embedder\.mlp\.[02]|final_layer\.(linear|adaLN_modulation\.1)"
    r"|blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12]|adaLN_modulation\.1))\.(weight|bias)"
    r"|y_embedder\.embedding_table\.weight"
)


def flax_tree_to_canonical(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return canonical weights {name: array} of a flat official tree {'net/x_embedder/proj/kernel': array}.

    Bitwise: kernels [... in out] are transposed to [out in ...], all else is as it was.  The fixed table `pos_embed`
    is in no Flax tree and so not in the result.  Raises UserError for a name that the rule does not know.
    """
    weights = {}
    for name, array in flat.items():
        is_kernel = name.endswith("/kernel")
        weights[canonical_name(name)] = np.ascontiguousarray(to_torch(array)) if is_kernel else np.asarray(array)
    return weights


def canonical_to_flax_tree(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the flat official tree of canonical weights, the inverse of `flax_tree_to_canonical`.

    The fixed table `pos_embed` is left out.  Raises UserError for a name that the rule does not know.
    """
    flat = {}
    for name, array in weights.items():
        if name not in TABLES:
            path = flax_name(name)
            flat[path] = np.ascontiguousarray(to_flax(array)) if path.endswith("/kernel") else np.asarray(array)
    return flat


def canonical_name(name: str) -> str:
    """Return the canonical name of an official Flax path.  Raises UserError if there is none."""
    *modules, leaf = name.removeprefix("net/").split("/")
    modules = [m for m in modules if m not in ("_flax_linear", "_flax_embedding")]
    modules = [BOTH_WAYS.get(m, m.removeprefix("layers_")) for m in modules]
    canonical = ".".join([*modules, {"kernel": "weight", "embedding": "weight"}.get(leaf, leaf)])
    if not CANONICAL.fullmatch(canonical) or flax_name(canonical).removeprefix("net/") != name.removeprefix("net/"):
        raise UserError(f"{name!r} is not a parameter of the official Flax network that this converter knows")
    return canonical


def flax_name(name: str) -> str:
    """Return the official Flax path of a canonical name.  Raises UserError if there is none."""
    if not CANONICAL.fullmatch(name):
        raise UserError(f"{name!r} is not a canonical parameter that this converter knows")
    module, _, leaf = name.rpartition(".")
    wrapper = [] if module in PLAIN else ["_flax_embedding" if module in EMBEDDINGS else "_flax_linear"]
    if leaf == "weight":
        leaf = "embedding" if module in EMBEDDINGS else "kernel"
    inverse = {canonical: flax for flax, canonical in BOTH_WAYS.items()}
    modules = [f"layers_{m}" if m.isdigit() else inverse.get(m, m) for m in module.split(".")]
    return "/".join(["net", *modules, *wrapper, leaf])


def to_torch(kernel: np.ndarray) -> np.ndarray:
    """Return a kernel [... in out] as a weight [out in ...]."""
    return kernel.transpose(kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2))


def to_flax(weight: np.ndarray) -> np.ndarray:
    """Return a weight [out in ...] as a kernel [... in out]."""
    return weight.transpose(*range(2, weight.ndim), 1, 0)
