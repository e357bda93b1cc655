"""Writes a folder in the format of diffusers, which `parity.diffusers_pipeline` and both frameworks' `load` read.

    model_index.json                                        the pipeline, its transformer and scheduler
    scheduler/scheduler_config.json                         diffusers' FlowMapEulerDiscreteScheduler
    transformer/config.json                                 the network and the config of its run
    transformer/diffusion_pytorch_model.safetensors         canonical weights
    vae/config.json                                         of latents: the autoencoder's name and the convention

Source: diffusers 0.42.1, pipelines/pipeline_utils.py, schedulers/scheduling_flow_map_euler_discrete.py and
models/autoencoders/autoencoder_kl.py.
"""

import json
import pathlib
from typing import Any

import numpy as np

from meanflow.config import latents, options, store
from meanflow.errors import UserError
from meanflow.files import replace_text
from meanflow.weights import files
from parity.hub_folder import without_paths

VERSION = "0.42.1"  # of diffusers, whose format this is
MODULE = "parity.diffusers_pipeline"  # which defines both classes
PIPELINE, TRANSFORMER, SCHEDULER = "MeanFlowPipeline", "MeanFlowTransformer", "FlowMapEulerDiscreteScheduler"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TIMESTEPS = 1000  # diffusers' unit of time: timestep 1000 is our t = 1


def write(dest: pathlib.Path, weights: dict[str, np.ndarray], metadata: dict[str, str], config: options.Config) -> None:
    """Write the folder.  metadata: text for the weights.  Raises UserError if it cannot be written."""
    convention = latents.of(config)
    write_transformer(dest / "transformer", weights, metadata, config)
    components = {"scheduler": ["diffusers", SCHEDULER], "transformer": [MODULE, TRANSFORMER]}
    write_json(dest / "scheduler" / "scheduler_config.json", SCHEDULER, scheduler_settings(config))
    if convention is not None:
        write_json(dest / "vae" / "config.json", "AutoencoderKL", vae_settings(config, convention))
    write_json(dest / "model_index.json", PIPELINE, components)


def write_transformer(
    dest: pathlib.Path, weights: dict[str, np.ndarray], metadata: dict[str, str], config: options.Config
) -> None:
    """Write the network's config and weights.  Raises UserError if they cannot be written."""
    config = without_paths(config)
    try:
        dest.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {dest}: {error.strerror}") from error
    files.save(dest / WEIGHTS, weights, metadata | {"config": store.to_json(config)})
    write_json(dest / "config.json", TRANSFORMER, transformer_settings(config))


def transformer_settings(config: options.Config) -> dict[str, Any]:
    """Return the arguments of `MeanFlowTransformer`: sizes by diffusers' names, and the whole config."""
    c = config.model
    return {
        "sample_size": c.input_size, "in_channels": c.channels, "num_classes": c.num_classes,
        "run": json.loads(store.to_json(config)),
    }  # fmt: skip


def scheduler_settings(config: options.Config) -> dict[str, Any]:
    """Return the arguments of the scheduler, whose steps are those of the sampler `euler`."""
    return {"num_train_timesteps": TIMESTEPS, "shift": config.sample.shift}


def vae_settings(config: options.Config, convention: latents.Convention) -> dict[str, Any]:
    """Return the name of the autoencoder and a convention as AutoencoderKL states it: raw = std z / factor + mean."""
    shift, scale = convention.shift, convention.scale
    settings: dict[str, Any] = {"_name_or_path": without_paths(config).latents.vae}
    if len(shift) == len(scale) == 1:
        return settings | {"scaling_factor": scale[0], "shift_factor": shift[0]}
    num = max(len(shift), len(scale))
    mean, std = (list(values * (num // len(values))) for values in (shift, tuple(1 / s for s in scale)))
    return settings | {"scaling_factor": 1.0, "latents_mean": mean, "latents_std": std}


def write_json(path: pathlib.Path, name: str, settings: dict[str, Any]) -> None:
    """Write the config of a class of this name.  Raises UserError if it cannot be written."""
    replace_text(path, json.dumps({"_class_name": name, "_diffusers_version": VERSION} | settings, indent=2) + "\n")
