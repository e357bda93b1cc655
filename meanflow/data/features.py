"""Features of clean images from a frozen DINOv2, with which REPA aligns the features of a network.

Source: arXiv:2410.06940; official repository sihyun-yu/REPA, utils.py (load_encoders) and train.py
(preprocess_raw_image).  Only PyTorch has these networks, so both trainers use this module.

Departs from the source: runs in float32, where the official trainer uses mixed precision; any number of tokens, where
the official code has 256 or, for images of 512 pixels, 1024.
"""

import math
from typing import Any

import numpy as np
from safetensors import SafetensorError

from meanflow.errors import UserError

MODEL_TYPES = ("dinov2", "dinov2_with_registers")
# Statistics of ImageNet's RGB values in [0, 1], which DINOv2 was trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Encoder:
    """A frozen DINOv2 that returns the features of one image patch per token; made by `load`."""

    def __init__(self, model: Any, grid: int):
        """model: a DINOv2 of transformers, modified in place.  grid: tokens per row and per column."""
        _resample_positions(model.embeddings, grid)
        self.model = model.eval().requires_grad_(False)
        self._side = grid * model.config.patch_size
        self._num_others = 1 + getattr(model.config, "num_register_tokens", 0)  # the class token is the first

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the features float32 [b grid^2 d], after the final layer norm, in row-major order.

        images: [b h w c] with 1 or 3 channels, float32 in data units ([-1, 1]) or uint8.
        """
        import torch
        from torch.nn import functional as F

        with torch.inference_mode():
            x = torch.tensor(images, device=self.model.device)
            x = x / 255 if x.dtype == torch.uint8 else (x + 1) / 2
            x = (x - x.new_tensor(MEAN)) / x.new_tensor(STD)  # makes three channels of one
            x = F.interpolate(x.permute(0, 3, 1, 2), (self._side, self._side), mode="bicubic")
            return self.model(x).last_hidden_state[:, self._num_others :].cpu().numpy()


def load(name_or_path: str, grid: int, width: int) -> Encoder:
    """Return a frozen DINOv2, on the current GPU if there is one.

    name_or_path: a directory as transformers saves it, or a name on the Hugging Face hub: `facebook/dinov2-base`.
    grid: tokens per row of the network being trained; images are resized so that each token has one patch.
    width: of the features, config.model.repa_dims.
    Raises UserError: transformers not installed; the model not found, not readable, incomplete, not a DINOv2 or of
        another width.
    """
    model = load_model(name_or_path, f"encoder {name_or_path!r} (config.data.encoder)", width)
    return Encoder(model, grid)


def load_model(name_or_path: str, where: str, width: int | None = None) -> Any:
    """Return a frozen DINOv2 of transformers, on the current GPU if there is one.

    where: its name in messages.  width: of its features; None: any.  Other arguments and errors as in `load`.
    """
    import torch

    try:
        import transformers  # optional, and slow to import
    except ModuleNotFoundError as error:
        raise UserError(
            f"{where} needs the package transformers, which is not installed: "
            'pip install --constraint constraints.txt -e ".[repa]"'
        ) from error
    config = _read(where, transformers.AutoConfig, name_or_path)
    _check(config, where, width)
    options = {"config": config, "dtype": torch.float32, "output_loading_info": True}
    model, report = _read(where, transformers.AutoModel, name_or_path, **options)
    if report["missing_keys"]:  # transformers would leave them at random values
        raise UserError(f"{where} lacks {', '.join(sorted(report['missing_keys']))}: give a complete copy")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)


def _read(where: str, kind: Any, name_or_path: str, **options: Any) -> Any:
    """Return what an Auto class of transformers reads.  Raises UserError if it cannot read it."""
    try:
        return kind.from_pretrained(name_or_path, **options)
    except (
        OSError,
        ValueError,
        RuntimeError,
        SafetensorError,
    ) as error:  # missing, malformed, of other shapes, truncated
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot load {where}: {reason}  Give a directory that transformers has saved, or a name on the Hugging "
            "Face hub; on a machine without a network, copy the directory from one that has it."
        ) from error


def _check(config: Any, where: str, width: int | None) -> None:
    """Raise UserError if a model's config is not of a DINOv2 or has another width."""
    if config.model_type not in MODEL_TYPES:
        raise UserError(f"{where} is a {config.model_type}; give one of {' or '.join(MODEL_TYPES)}")
    if width is not None and config.hidden_size != width:
        raise UserError(
            f"{where} has features of width {config.hidden_size}, but config.model.repa_dims asks for {width}: set "
            f"--config.model.repa_dims='({config.hidden_size},)' or choose another encoder"
        )


def _resample_positions(embeddings: Any, grid: int) -> None:
    """Resample the position embeddings [1 1+m^2 d] to another grid, as timm's resample_abs_pos_embed does.

    transformers itself resamples those of a DINOv2 without registers, but without a low-pass filter.
    """
    import torch
    from torch.nn import functional as F

    table = embeddings.position_embeddings.detach()
    first, patches = table[:, :1], table[:, 1:]
    size = math.isqrt(patches.shape[1])
    if size == grid:
        return
    patches = patches.unflatten(1, (size, size)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, (grid, grid), mode="bicubic", antialias=True)
    patches = patches.flatten(2).transpose(1, 2)
    embeddings.position_embeddings = torch.nn.Parameter(torch.cat([first, patches], dim=1))
