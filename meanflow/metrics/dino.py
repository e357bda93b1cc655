"""Features of images from DINOv2 ViT-L/14, for FD-DINOv2.

Source: arXiv:2306.04675; NVlabs/edm2, calculate_metrics.py, whose statistics this matches: images are resized to 224
by antialiased bicubic interpolation, and the feature is the class token after the last norm.
"""

from typing import Any

import numpy as np

from meanflow.data import features
from meanflow.metrics.extractor import Extract, Extractor

SIDE = 224  # pixels
OFFSET = 0.1  # the official network adds this to the grid before it resamples its positions


def load(name_or_path: str, batch_size: int = 32) -> Extract:
    """Return a function from images uint8 [b h w 1 or 3] to {"dino": float32 [b d]}, on the current GPU if any.

    name_or_path: a directory as transformers saves it, or a name on the Hugging Face hub: `facebook/dinov2-large`.
    Raises UserError as `encoder.load` does.
    """
    model = features.load_model(name_or_path, f"network {name_or_path!r} (config.evaluation.dino)")
    resample_positions(model.embeddings, SIDE // model.config.patch_size)

    def extract(images: np.ndarray) -> dict[str, np.ndarray]:
        parts = [encode(model, images[start : start + batch_size]) for start in range(0, len(images), batch_size)]
        return {"dino": np.concatenate(parts)}

    return Extractor(extract, {"dino": model.config.hidden_size})


def encode(model: Any, images: np.ndarray) -> np.ndarray:
    """Return the class token float32 [b d] of images uint8 [b h w 1 or 3], in full float32."""
    import torch  # slow to import, and only for this metric
    from torch.nn import functional as F

    from meanflow.torch_precision import full_float32

    with torch.inference_mode(), full_float32():
        x = torch.tensor(images, device=model.device).permute(0, 3, 1, 2).to(torch.float32)
        x = F.interpolate(x.expand(-1, 3, -1, -1), (SIDE, SIDE), mode="bicubic", antialias=True) / 255
        mean, std = (x.new_tensor(values)[:, None, None] for values in (features.MEAN, features.STD))
        return model((x - mean) / std).last_hidden_state[:, 0].cpu().numpy()


def resample_positions(embeddings: Any, grid: int) -> None:
    """Resample the position embeddings [1 1+m^2 d] to grid x grid patches, as the official network does."""
    import torch
    from torch.nn import functional as F

    table = embeddings.position_embeddings.detach()
    first, patches = table[:, :1], table[:, 1:]
    size = round(patches.shape[1] ** 0.5)
    if size == grid:
        return
    patches = patches.unflatten(1, (size, size)).permute(0, 3, 1, 2)
    factor = (grid + OFFSET) / size
    patches = F.interpolate(patches, scale_factor=(factor, factor), mode="bicubic", recompute_scale_factor=False)
    embeddings.position_embeddings = torch.nn.Parameter(
        torch.cat([first, patches.permute(0, 2, 3, 1).flatten(1, 2)], 1)
    )
