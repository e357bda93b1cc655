"""Which way the time of a flow model's weights runs, and an exact rewrite of weights whose time runs the other way.

Here t = 1 is noise and v = noise - data.  In the original SiT t = 1 is data and v = data - noise; its networks have the
parameter names of REPA's and decoupled MeanFlow's, whose time runs as ours.  Nothing in the weights tells them apart.
Sources: willisma/SiT, models.py, transport/path.py and train_utils.py; sihyun-yu/REPA, models/sit.py and train.py.
"""

import math
from typing import Any

import numpy as np

from meanflow.console_log import say
from meanflow.errors import UserError

DIRECTIONS = ("ours", "reversed")
MAX_PERIOD = 10_000.0  # of the sinusoidal features of time, see `models.layers.timestep_features`
SIT_PATHS = {"Linear", "GVP", "VP"}  # of SiT's --path-type; lower case in REPA and DMF
SIT_TARGETS = {"velocity", "score", "noise"}  # of SiT's --prediction; v in REPA and DMF
REPA_OPTIONS = {"path_type", "enc_type", "proj_coeff"}
NOT_OF_SIT = ("r_embedder.", "projectors.", "logvar_linear.")  # parameters that SiT does not have
PATCHES, FEATURES, LAST = "x_embedder.proj.weight", "t_embedder.mlp.0.weight", "final_layer.linear."


def settle(
    weights: dict[str, np.ndarray], arguments: Any, time: str | None, where: Any
) -> tuple[dict[str, np.ndarray], str]:
    """Return canonical weights whose time runs our way, and what was done, for messages; '' for nothing.

    arguments: options that the trainer kept, a Namespace, a dict or None.  time: `ours` | `reversed`, how it runs in
    `weights`; None to judge by `arguments` and names.  where: the file, for messages.
    What is assumed is said on stderr.  Raises UserError for a model of another path or target than SiT's published
    ones, and for `time` with weights that are not of a flow model.
    """
    patches, last = weights.get(PATCHES), weights.get(f"{LAST}weight")
    known = FEATURES in weights and "blocks.0.attn.qkv.weight" in weights
    if patches is None or last is None or not known or any(name.startswith(NOT_OF_SIT) for name in weights):
        if time == "reversed":
            raise UserError(f"--time=reversed is for weights of the original SiT, and {where} has others")
        return weights, ""
    learns_sigma = patches.ndim == 4 and len(last) == 2 * patches[0].size
    direction, why = (time, "by --time") if time else judge(learns_sigma, arguments, where)
    if not time and why:
        say(f"{where}: its time is taken to run {sense(direction)}: {why}")
    done = []
    if learns_sigma:
        weights = without_sigma(weights)
        done.append("without its sigma")
        say(f"left out of {where}, a sigma that sampling does not read: the second half of {LAST}*")
    if direction == "reversed":
        weights = turned(weights)
        done.append("its time turned round")
    return weights, ", ".join(done)


def sense(direction: str) -> str:
    """Return in words how a time runs."""
    return "as here, with noise at 1" if direction == "ours" else "the other way, with data at 1, and is turned round"


def judge(learns_sigma: bool, arguments: Any, where: Any) -> tuple[str, str]:
    """Return the direction, and why if that should be said.  Arguments and errors as `settle`."""
    options = arguments if isinstance(arguments, dict) else getattr(arguments, "__dict__", {})
    path, target = options.get("path_type"), options.get("prediction")
    if path in SIT_PATHS or target in SIT_TARGETS:
        if (path or "Linear", target or "velocity") != ("Linear", "velocity"):
            raise UserError(
                f"{where} was trained by SiT with path {path!r} to predict {target!r}: only its linear path and "
                "velocity are those of this project"
            )
        return "reversed", "the options it keeps are those of SiT's trainer (willisma/SiT)"
    if learns_sigma:
        return "reversed", (
            "it predicts twice the channels that it reads, as the original SiT does (willisma/SiT).  If it is of DiT, "
            "a diffusion model, it cannot be used; --time=ours keeps its time"
        )
    if options.keys() & REPA_OPTIONS:
        return "ours", ""
    return "ours", (
        "nothing in it says which way, and REPA's does.  If it is of the original SiT (willisma/SiT), it would sample "
        "nonsense: add --time=reversed"
    )


def without_sigma(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the weights with the first c of the 2c channels that the last layer predicts for each pixel."""
    channels = weights[PATCHES].shape[1]

    def first(a: np.ndarray) -> np.ndarray:
        pixels = a.reshape(-1, 2 * channels, *a.shape[1:])
        return np.ascontiguousarray(pixels[:, :channels]).reshape(-1, *a.shape[1:])

    return weights | {name: first(a) for name, a in weights.items() if name.startswith(LAST)}


def turned(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return weights that predict -v(z, 1 - t) where the given ones predict v(z, t).

    With [C, S] the weights of the cosines and sines of frequencies f, C cos(f (1 - t)) + S sin(f (1 - t)) equals
    (C cos f + S sin f) cos(f t) + (C sin f - S cos f) sin(f t).  Exact up to rounding of the result.
    """
    features = weights[FEATURES].astype(np.float64)
    half = features.shape[1] // 2
    f = np.exp(-math.log(MAX_PERIOD) * np.arange(half) / half)
    c, s = features[:, :half], features[:, half:]
    both = np.concatenate([c * np.cos(f) + s * np.sin(f), c * np.sin(f) - s * np.cos(f)], axis=1)
    negated = {name: -a for name, a in weights.items() if name.startswith(LAST)}
    return weights | negated | {FEATURES: both.astype(weights[FEATURES].dtype)}
