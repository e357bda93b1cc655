"""Makes what a test of latents and metrics needs: a folder of photographs, an autoencoder, weights of Inception."""

import pathlib
import zlib

import numpy as np
import PIL.Image
import safetensors.numpy

TILE = 48  # pixels


def photographs(directory, num=60):
    """Write `num` tiles of the photographs that scikit-image and scikit-learn hold, a class each photograph."""
    import skimage
    from sklearn import datasets

    sources = {
        name: image for name, image in zip(("china", "flower"), datasets.load_sample_images().images, strict=True)
    }
    data = pathlib.Path(skimage.__file__).parent / "data"
    sources |= {name: np.asarray(PIL.Image.open(data / f"{name}.png")) for name in ("astronaut", "chelsea", "coffee")}
    each = -(-num // len(sources))
    for name, image in sources.items():
        (directory / name).mkdir(parents=True)
        rng = np.random.RandomState(zlib.crc32(name.encode()) % 2**32)
        for i in range(each):
            top, left = (rng.randint(size - TILE - i) for size in image.shape[:2])
            tile = image[top : top + TILE + i, left : left + TILE]  # of several sizes
            PIL.Image.fromarray(tile).save(directory / name / f"{i:03d}.png")
    return directory


def autoencoder(directory):
    """Save a small random autoencoder of diffusers' own class: 32 pixels become 8x8x4."""
    import diffusers
    import torch

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = diffusers.AutoencoderKL(
        **kinds, block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4
    )
    vae.save_pretrained(directory)
    return directory


def inception(path):
    """Write random weights of Inception, by a rule of their names."""
    from torch_impl.models.inception import Inception

    weights = {}
    for name, tensor in Inception().state_dict().items():
        r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(tensor.shape))
        if name.endswith("conv.weight"):
            r *= np.sqrt(2 / np.prod(tensor.shape[1:]))
        elif name.endswith("bn.weight"):
            r = 1 + 0.1 * r
        elif name.endswith("running_var"):
            r = np.exp(0.2 * r)
        elif name == "fc.weight":
            r /= np.sqrt(tensor.shape[1])
        else:
            r *= 0.1
        weights[name] = r.astype(np.float32)
    safetensors.numpy.save_file(weights, path)
    return path
