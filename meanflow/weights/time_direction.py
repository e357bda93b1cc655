"""Tells weights of the original SiT, whose time runs from noise at 0 to data at 1, the reverse of this project.

Their names are those of the SiT of REPA and decoupled MeanFlow, whose time runs as ours.  Source: willisma/SiT,
models.py and train_utils.py; sihyun-yu/REPA, models/sit.py and train.py.  SiT's network predicts a sigma that it drops,
so its last layer is twice as wide as REPA's, and its trainer's options have other values.
"""

import sys
from typing import Any

import numpy as np

from meanflow.errors import UserError

PATHS = {"Linear", "GVP", "VP"}  # of SiT's --path-type; REPA and DMF write them small
TARGETS = {"velocity", "score", "noise"}  # of SiT's --prediction; REPA and DMF: v
OURS = ("r_embedder.", "projectors.", "logvar_linear.")  # parameters that SiT does not have
REVERSED = (
    "whose time runs from noise at 0 to data at 1, the reverse of this project: they would sample nonsense.  There is "
    "no option --time to turn it round yet; use weights of REPA or decoupled MeanFlow"
)


def check(weights: dict[str, np.ndarray], arguments: Any, where: Any) -> None:
    """Refuse weights of the original SiT, and warn of a SiT that may be one, for nothing tells.

    arguments: options that the trainer kept, a Namespace, a dict or None.  where: the file, for messages.
    Raises UserError.
    """
    patches, last = weights.get("x_embedder.proj.weight"), weights.get("final_layer.linear.weight")
    if patches is None or last is None or "blocks.0.attn.qkv.weight" not in weights:
        return
    if patches.ndim == 4 and len(last) == 2 * patches[0].size:
        raise UserError(
            f"{where} predicts twice the channels that it reads, a learned sigma: these are weights of the original "
            f"DiT, a diffusion model, or of the original SiT (willisma/SiT), {REVERSED}"
        )
    if any(name.startswith(OURS) for name in weights):
        return
    options = arguments if isinstance(arguments, dict) else getattr(arguments, "__dict__", {})
    if options.get("path_type") in PATHS or options.get("prediction") in TARGETS:
        raise UserError(f"{where} was written by the trainer of the original SiT (willisma/SiT), {REVERSED}")
    if not {"path_type", "enc_type", "proj_coeff"} & options.keys():
        print(
            f"warning: nothing in {where} says which way its time runs.  It must not be of the original SiT "
            f"(willisma/SiT), {REVERSED}",
            file=sys.stderr,
        )
