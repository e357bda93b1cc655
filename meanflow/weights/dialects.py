"""Canonical names for networks that other codes publish under names of their own; arrays are unchanged.

Sources: NVlabs/FastGen, fastgen/networks/DiT/network.py (`load_state_dict` states the renaming from DiT's names) and
configs/experiments/DiT/config_mf_*.py; Bili-Sakura/iMF-diffusers, src/diffusers/models/transformers/transformer_imf.py,
and its later version in Visual-Generative-Foundation-Model-Collection, src/diffusers/iMF; sihyun-yu/REPA, utils.py,
`load_legacy_checkpoints`.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from meanflow.console_log import say
from meanflow.errors import UserError

Weights = dict[str, np.ndarray]
FASTGEN = {  # parts of its names and of canonical ones
    "_embedder.proj_net.": "_embedder.mlp.",
    "y_embedder.class_embeddings.": "y_embedder.embedding_table.",
    ".attention.": ".attn.",
    ".feed_forward.": ".mlp.",
    ".conditioning_net.": ".adaLN_modulation.",
    "final_layer.projection.": "final_layer.linear.",
    "final_layer.adaptive_params.": "final_layer.adaLN_modulation.",
}
LOG_VARIANCE = "logvar_linear."  # every DiT of FastGen has one, which reads the embedding of t; only sCM trains it
DECODER = "decoder_blocks."  # in REPA's first version, the blocks behind those that it aligns


class Dialect(NamedTuple):
    """The names of one code."""

    code: str
    mark: re.Pattern  # found in names of this code only
    rename: Callable[[Weights, Any], Weights]  # (weights, the file for messages) -> weights by canonical names


def translate(weights: Weights, where: Any) -> tuple[Weights, str]:
    """Return weights by canonical names, and whose names they had, for messages; '' if they are left as they are.

    where: the file, for messages.  Raises UserError for a network whose time its weights do not show.
    """
    for dialect in DIALECTS:
        if any(dialect.mark.search(name) for name in weights):
            return dialect.rename(weights, where), f"named as in {dialect.code}"
    return weights, ""


def fastgen(weights: Weights, where: Any) -> Weights:
    """Rename a DiT of FastGen, without its log-variance.

    Its published students have `time_cond_type="diff"`, so that r_embedder embeds t - r, and `scale_t=False`.
    """
    if not any(name.startswith("r_embedder.") for name in weights):
        raise UserError(
            f"{where} holds a DiT of FastGen without r_embedder, a teacher: whether it predicts a velocity, and of "
            "which time, is only in FastGen's config.  Read the model that it was fine-tuned from, or a MeanFlow "
            "student"
        )
    unused = sorted(name for name in weights if name.startswith(LOG_VARIANCE))
    if unused:
        say(f"left out of {where}, which only sCM trains: {', '.join(unused)}")

    def renamed(name: str) -> str:
        for theirs, ours in FASTGEN.items():
            name = name.replace(theirs, ours)
        return name

    return {renamed(name): a for name, a in weights.items() if name not in unused}


def diffusers_imf(weights: Weights, where: Any) -> Weights:
    """Rename improved MeanFlow's transformer, whose wrappers are officially `_flax_linear` and `_flax_embedding`."""

    def renamed(name: str) -> str:
        name = re.sub(r"\.linear\.(weight|bias)$", r"._flax_linear.\1", name)
        return re.sub(r"(?<=\.embedding_table)\.embedding\.", "._flax_embedding.", name)

    return {renamed(name): a for name, a in weights.items()}


def repa_legacy(weights: Weights, where: Any) -> Weights:
    """Number the decoder's blocks after the encoder's, as `generate.py --legacy` does.

    Its --encoder-depth is the number of the encoder's blocks, since they are numbered from 0.
    """
    encoder = {int(m[1]) for name in weights if (m := re.match(r"blocks\.(\d+)\.", name))}

    def renamed(match: re.Match) -> str:
        return f"blocks.{int(match[1]) + len(encoder)}."

    return {re.sub(rf"^{re.escape(DECODER)}(\d+)\.", renamed, name): a for name, a in weights.items()}


DIALECTS = (
    Dialect("NVlabs/FastGen", re.compile(r"^t_embedder\.proj_net\."), fastgen),
    Dialect("iMF-diffusers", re.compile(r"^y_embedder\.embedding_table\.embedding\.weight$"), diffusers_imf),
    Dialect("REPA's --legacy", re.compile(rf"^{re.escape(DECODER)}\d+\."), repa_legacy),
)
