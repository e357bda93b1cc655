"""Fits weights and config to each other: what published files have too much or too little, or cannot show."""

import copy
import json
from typing import Any

import numpy as np

from meanflow.config import latents, options
from meanflow.config.networks import DIT_SIZES
from meanflow.console_log import say
from meanflow.errors import UserError
from meanflow.weights.infer import inferred_config

DMF_DEPTH = 20  # of the published flow maps of decoupled MeanFlow, all of size XL
LOG_VARIANCE_FEATURES = 128  # of each time, in its log-variance
CONVENTIONS = {"imf_dit": "imf", "edm2": "edm2", "dit": "sd", "dmf_dit": "sd"}  # of published models of latents
VAE = "stabilityai/sd-vae-ft-mse"
LATENT_CHANNELS = 4
UNCONDITIONAL = {"method.guidance": False, "method.label_drop_prob": 0.0, "evaluation.classifier": False}
INPUT_SIZE = 32  # of the published runs whose weights do not contain it: latents of 256 pixels


def fit(config: Any, weights: dict[str, np.ndarray]) -> tuple[Any, dict[str, np.ndarray]]:
    """Return the config, None if it was None, and the canonical weights, each without what the other cannot have.

    Improved MeanFlow has a head of v only if the weights have one; released ones do not.  Left out, and said: the
    log-variance of EDM2's network where the config has none; its embedder of one time if it has two, since official
    Re-MeanFlow builds that and deletes it for training.  Decoupled MeanFlow's log-variance, which sampling does not
    read, is 0 if the weights lack it.
    """
    c: Any = config.model if config is not None else None
    unused = {"unet.emb_noise.weight"} if "unet.emb_noise_t.weight" in weights else set()
    if c is not None and c.name == "edm2" and not c.logvar_channels:
        unused |= {name for name in weights if name.startswith("logvar_")}
    for name in sorted(unused & weights.keys()):
        say(f"left out {name}, which the network does not read")
    weights = {name: a for name, a in weights.items() if name not in unused}
    if c is not None and c.name == "dmf_dit" and "logvar_linear.weight" not in weights:
        say("the weights lack logvar_linear, which sampling does not read: it is 0")
        zeros = {"weight": (1, 2 * LOG_VARIANCE_FEATURES), "bias": (1,)}
        weights |= {f"logvar_linear.{name}": np.zeros(shape, np.float32) for name, shape in zeros.items()}
    if c is not None and c.name == "imf_dit" and c.head_depth:
        config = copy.deepcopy(config)
        config.model.v_heads = any(name.startswith("v_heads.") for name in weights)  # pyright: ignore
    return config, weights


def published_config(weights: dict[str, np.ndarray], model: dict[str, Any]) -> options.Config:
    """Return the config of the network that weights belong to, with what names and shapes cannot show.

    That is the number of heads and the depth of a flow map's first part, from the table of published sizes; and the
    latents, from the convention of the published systems.  model: options of `config.model` that are given instead.
    Raises UserError if a size is not published and nothing gives what is missing.
    """
    config = inferred_config(weights, model.get("input_size", INPUT_SIZE))
    c: Any = config.model
    if c.name in ("dit", "dmf_dit") and not c.get("qk_norm") and "num_heads" not in model:
        sizes = [size for size in DIT_SIZES.values() if (size["depth"], size["width"]) == (c.depth, c.width)]
        if not sizes:
            raise UserError(
                f"weights do not show the number of heads, and no published network has depth {c.depth} and width "
                f"{c.width}: give num_heads, or config"
            )
        c.num_heads = sizes[0]["num_heads"]
    if c.name == "dmf_dit" and "dmf_depth" not in model:
        if (c.depth, c.width) != (DIT_SIZES["XL"]["depth"], DIT_SIZES["XL"]["width"]):
            raise UserError(
                f"weights do not show where a flow map's second part begins, and no published one has depth {c.depth}: "
                "give dmf_depth, or config"
            )
        c.dmf_depth = DMF_DEPTH
    unknown = sorted(model.keys() - set(c))
    if unknown:
        raise UserError(f"{unknown[0]} is no option of the network {c.name}; there are {', '.join(sorted(c))}")
    c.update(model)
    if c.name == "unet":  # which has no classes
        config.update_from_flattened_dict(UNCONDITIONAL)
    if c.channels == LATENT_CHANNELS and c.name in CONVENTIONS:
        config.latents.update(latents.CONVENTIONS[CONVENTIONS[c.name]]._asdict(), vae=VAE)  # pyright: ignore
    return config


def check_latents(config: options.Config, path: str, metadata: dict[str, str]) -> None:
    """Raise UserError naming both conventions if the weights of `path` were trained on latents of another one.

    metadata: of the .safetensors, in which parity.convert stores the convention.
    """
    theirs = convention_in(path, metadata)
    if theirs is not None:
        latents.check_same(latents.of(config), theirs, "the config (config.latents)", path)


def convention_in(path: str, metadata: dict[str, str]) -> latents.Convention | None:
    """Return the convention of latents in the metadata of a .safetensors, None if it has none.  Raises UserError."""
    if "latents" not in metadata:
        return None
    try:
        return latents.from_dict(json.loads(metadata["latents"]))
    except (json.JSONDecodeError, UserError) as error:
        raise UserError(f"{path} has damaged metadata about its latents ({error}): convert it again") from error
