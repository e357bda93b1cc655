"""Encodes images to latents and decodes latents to images with a frozen autoencoder, from numpy to numpy.

Both run in the precision that the process has set for float32 (`devices.start_torch`).
"""

import functools

import numpy as np
import torch

from meanflow.config import latents as conventions
from meanflow.data.latents import autoencoder, units
from torch_impl.batches import in_batches
from torch_impl.models.vae import AutoencoderKL


def make_encoder(files, pixels, batch_size=8):
    """Return encode(images uint8 [b H W c]) -> moments float32 [b h w 2c], numpy.

    Moments are the means, then the standard deviations, of raw latents.
    files: from `autoencoder.read`.  pixels: the encoder's input range, symmetric (x / 127.5 - 1) or unit (x / 255).
    At most `batch_size` images are encoded at once.
    Raises UserError for weights that do not fit and, when called, for images of the wrong type or size.
    """
    autoencoder.check_pixels(pixels)

    def moments(net, images):
        x = images.permute(0, 3, 1, 2).float()
        x = x / 255 if pixels == "unit" else x / 127.5 - 1
        mean, log_variance = net.encode(x)
        moments = torch.cat([mean, torch.exp(log_variance / 2)], dim=1)
        return (moments.permute(0, 2, 3, 1),)

    run = in_batches(functools.partial(AutoencoderKL, **files.settings), files.weights, moments, batch_size)

    def encode(images):
        autoencoder.check_images(files, images)
        return run(images)[0]

    return encode


def make_decoder(files, convention, batch_size=8):
    """Return decode(latents float32 [b h w c] in data units) -> images float32 [b H W c] in [-1, 1], numpy.

    Images are not clipped.
    files: from `autoencoder.read`.  convention: the `latents.Convention` of the data units; with unit pixels the
    decoder's output in [0, 1] becomes 2x - 1.  At most `batch_size` images are decoded at once.
    Raises UserError for weights or a convention that do not fit and, when called, for latents that do not.
    """
    conventions.check(convention, files.settings["latent_channels"])

    def images(net, z):
        x = net.decode(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return (2 * x - 1 if convention.pixels == "unit" else x,)

    run = in_batches(functools.partial(AutoencoderKL, **files.settings), files.weights, images, batch_size)

    def decode(z):
        autoencoder.check_latents(files, z)
        return run(np.asarray(units.to_raw(z, convention), np.float32))[0]

    return decode
