"""Reads the autoencoder of latents from diffusers' format, for both implementations.

    read("runs/sd-vae-ft-mse")             a directory with config.json and diffusion_pytorch_model.safetensors or .bin
    read("stabilityai/sd-vae-ft-mse")      a name on the Hugging Face hub

Canonical names are those of diffusers' current state dict; names in older files are converted.
Source: diffusers, AutoencoderKL and its configuration.  Nothing in a file is ever executed.
"""

import hashlib
import json
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from meanflow.errors import UserError
from meanflow.weights import files as weight_files
from meanflow.weights import hub, sources

CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # the first that exists
KIND = "AutoencoderKL"
# The options of AutoencoderKL that this project's network has; older files omit those in `DEFAULTS`.
DEFAULTS = {"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True}
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
PIXELS = ("symmetric", "unit")
SIZES = ("in_channels", "latent_channels", "layers_per_block", "norm_num_groups")
# Attention had these names until diffusers 0.15, and its matrices [c c] may be stored as 1x1 convolutions [c c 1 1].
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD = re.compile(r"((?:en|de)coder\.mid_block\.attentions\.0\.)(query|key|value|proj_attn)(\.(?:weight|bias))")
ATTENTION = re.compile(r"(en|de)coder\.mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight")


class Files(NamedTuple):
    """The settings and weights from which `models/vae.py` builds an autoencoder."""

    settings: dict[str, Any]  # keyword arguments of AutoencoderKL there
    weights: dict[str, np.ndarray]  # float32, by canonical names
    digest: str  # of settings and weights, 16 hexadecimal digits, independent of the file format


def read(name_or_path: str) -> Files:
    """Read an autoencoder from a directory, or from the Hugging Face hub.

    Raises UserError: missing, damaged or unreadable files, another kind of autoencoder; the hub out of reach or the
    package huggingface_hub not installed.  `from_canonical` checks the names and shapes of the weights.
    """
    config, weights = _locate(name_or_path)
    return of(_settings(config), _arrays(weights), str(weights))


def read_factor(name_or_path: str) -> int:
    """Return the `factor` of an autoencoder without reading its weights.  Raises UserError as `read`."""
    return factor(Files(_settings(_locate(name_or_path)[0]), {}, ""))


def _locate(name_or_path: str) -> tuple[pathlib.Path, pathlib.Path]:
    """Return the local paths of config and weights.  Raises UserError as `read`."""
    directory = pathlib.Path(name_or_path)
    if directory.is_dir():
        return directory / CONFIG, _weights_in(directory)
    if directory.is_absolute() or re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path)) is None:
        raise UserError(
            f"there is no directory {name_or_path}; name one that diffusers has saved an autoencoder in, or one on the "
            "Hugging Face hub: stabilityai/sd-vae-ft-mse"
        )
    return _download(str(name_or_path))


def of(settings: dict[str, Any], weights: dict[str, np.ndarray], where: str) -> Files:
    """Return the autoencoder with these settings and weights, whose names may be those of older files.

    where: the source of the weights, for messages.  Raises UserError for a name that occurs twice, old and current.
    """
    arrays = {}
    for name, array in weights.items():
        current = OLD.sub(lambda match: match[1] + OLD_NAMES[match[2]] + match[3], name)
        if current in arrays:
            raise UserError(f"{where} holds {current} twice, by its old and by its current name: give another copy")
        if ATTENTION.fullmatch(current) and array.shape[2:] == (1, 1):
            array = array[:, :, 0, 0]
        arrays[current] = np.array(array, np.float32, order="C")
    return Files(settings, arrays, _digest(settings, arrays))


def factor(files: Files) -> int:
    """Return the factor by which latents are smaller than images along each side."""
    return 2 ** (len(files.settings["block_out_channels"]) - 1)


def latent_shape(files: Files, image_size: int) -> tuple[int, int, int]:
    """Return the shape (h, w, c) of the latents of square images.  Raises UserError if the size is not divisible."""
    if image_size % factor(files):
        raise UserError(f"images of {image_size} pixels have no latents: give a multiple of {factor(files)}")
    side = image_size // factor(files)
    return side, side, files.settings["latent_channels"]


def check_pixels(pixels: str) -> None:
    """Raise UserError unless `pixels` is one of PIXELS."""
    if pixels not in PIXELS:
        raise UserError(f"pixels {pixels!r}: choose symmetric ([-1, 1]) or unit ([0, 1])")


def check_images(files: Files, images: np.ndarray) -> None:
    """Raise UserError unless images are uint8 [b H W c] that the autoencoder can encode."""
    channels = files.settings["in_channels"]
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] != channels:
        raise UserError(f"images of {images.dtype} {images.shape}: the encoder takes uint8 [b H W {channels}]")
    if images.shape[1] % factor(files) or images.shape[2] % factor(files):
        raise UserError(f"images of {images.shape[1:3]} pixels have no latents: give multiples of {factor(files)}")


def check_latents(files: Files, latents: np.ndarray) -> None:
    """Raise UserError unless latents are [b h w c] with the autoencoder's number of channels."""
    channels = files.settings["latent_channels"]
    if latents.ndim != 4 or latents.shape[3] != channels:
        raise UserError(f"latents of shape {latents.shape}: the decoder takes [b h w {channels}]")


def _weights_in(directory: pathlib.Path) -> pathlib.Path:
    """Return the file of weights in a directory.  Raises UserError if there is none."""
    for name in WEIGHTS:
        if (directory / name).is_file():
            return directory / name
    if (directory / "vae").is_dir():
        raise UserError(f"{directory} is a whole pipeline: name the autoencoder in it, {directory / 'vae'}")
    raise UserError(f"{directory} holds neither {' nor '.join(WEIGHTS)}: give a directory as diffusers saves it")


def _download(name: str) -> tuple[pathlib.Path, pathlib.Path]:
    """Return the local paths of config and weights of a name on the hub.  Raises UserError if out of reach."""
    what = f"the autoencoder {name}"
    return hub.fetch(name, CONFIG, what=what), hub.fetch(name, *WEIGHTS, what=what)


def _settings(path: pathlib.Path) -> dict[str, Any]:
    """Return the settings of a config.json.  Raises UserError if it is not that of an autoencoder of this kind."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as the config of an autoencoder: {error}") from error
    if not isinstance(config, dict) or config.get("_class_name") != KIND:
        kind = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{path} is of a {kind}, and only {KIND} is known: stabilityai/sd-vae-ft-mse is one")
    return settings(config, str(path))


def settings(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the keyword arguments of our AutoencoderKL for a config of diffusers' one.

    where: the source of the config, for messages.  Raises UserError for options that are missing or not supported.
    """
    config = DEFAULTS | config
    needed = (*SIZES, "out_channels", "block_out_channels", "act_fn", *BLOCKS, *DEFAULTS)
    missing = [name for name in needed if name not in config]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}: give a complete copy")
    _check(where, config)
    return {name: config[name] for name in SIZES} | {"block_out_channels": tuple(config["block_out_channels"])}


def _check(where: str, config: dict[str, Any]) -> None:
    """Raise UserError for an option that this project's network does not support."""
    widths = config["block_out_channels"]
    if not isinstance(widths, list) or not widths:
        raise UserError(f"{where}: block_out_channels is {widths!r}, and not a list of numbers")
    for name in SIZES:
        if not all(isinstance(size, int) and size > 0 for size in (config[name], *widths)):
            raise UserError(f"{where}: {name} {config[name]!r} and block_out_channels {widths} must be whole numbers")
    known: dict[str, Any] = DEFAULTS | {"act_fn": "silu", "out_channels": config["in_channels"]}
    known |= {name: [block] * len(widths) for name, block in BLOCKS.items()}
    for name, value in known.items():
        if config[name] != value:
            raise UserError(
                f"{where}: {name} is {config[name]!r}, and only {value!r} is known; use another autoencoder"
            )


def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the weights in a file.  Raises UserError if it cannot be read."""
    if weight_files.kind_of(path) != "torch":
        return weight_files.load(path)
    import torch  # only this format needs it

    loaded = sources.load_torch(path)
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise UserError(f"{path} is no state dict: give a file of tensors by their names")
    return {name: tensor.detach().float().numpy() for name, tensor in loaded.items()}


def _digest(settings: dict[str, Any], weights: dict[str, np.ndarray]) -> str:
    """Return 16 hexadecimal digits of settings and weights, independent of the order of names."""
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, array in sorted(weights.items()):
        total.update(f"{name} {array.shape}".encode())
        total.update(array.tobytes())
    return total.hexdigest()[:16]
