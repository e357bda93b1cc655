"""The framework-free half of the encode commands: flags, and the dataset of latents."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

from absl import flags

from meanflow.config import latents as conventions
from meanflow.config import options, paths
from meanflow.data import records
from meanflow.data.images import pictures
from meanflow.data.latents import autoencoder, dataset, units
from meanflow.errors import UserError

OWN = "data"  # the convention computed from the data themselves
VAE = "stabilityai/sd-vae-ft-mse"
Start = Callable[[options.Config], tuple[int, int]]
MakeEncoder = Callable[[Any, str, int], dataset.Encode]

flags.disclaim_key_flags()  # --help lists the flags under the command that defines them


def define_flags() -> None:
    """Define the flags of the encode commands."""
    flags.DEFINE(
        paths.READ, "source", "", "Images: a folder with one folder per class, a .zip of it, or a TFDS dataset."
    )
    flags.DEFINE_string("split", "train", "Split of a TFDS dataset.")
    flags.DEFINE(
        paths.READ, "data_dir", "", "Where TFDS keeps datasets; empty: TFDS_DATA_DIR, else ~/tensorflow_datasets."
    )
    flags.DEFINE(paths.WRITTEN, "dest", "", "Directory of the latent dataset; an unfinished one is continued.")
    flags.DEFINE(paths.READ, "vae", VAE, "Autoencoder: a directory as diffusers saves it, or a name on the hub.")
    flags.DEFINE_enum(
        "convention", "sd", [*conventions.CONVENTIONS, OWN],
        "How latents become data units (meanflow/config/latents.py); data: mean 0, deviation 1 per channel.",
    )  # fmt: skip
    flags.DEFINE_integer("image_size", 256, "Side of the images after the crop, in pixels.", lower_bound=1)
    flags.DEFINE_enum("crop", "centre", pictures.CROPS, "centre: as ADM; none: images already have that size.")
    flags.DEFINE_bool("flip", True, "Also keep the latents of the mirrored image, for --config.data.flip.")
    flags.DEFINE_bool("pixels", False, "Also keep the images, for REPA with --config.data.encoder.")
    flags.DEFINE_integer("batch_size", 32, "Images that a process encodes at once.", lower_bound=1)
    flags.DEFINE_integer(
        "shard_size", dataset.SHARD_SIZE, "Images per file; if killed, each process redoes one.", lower_bound=1
    )
    flags.DEFINE_bool("skip_broken", False, "Skip images that cannot be read; the metadata list them.")


def encode(start: Start, make_encoder: MakeEncoder) -> None:
    """Write the latents that the command line asks for, and print their directory.

    start: (config) -> (index of this process, number of processes).  make_encoder: (autoencoder, pixels, batch size) ->
    encode, see `dataset.make`.  Raises UserError for what cannot be read, encoded or written.
    """
    f = flags.FLAGS
    for name in ("source", "dest"):
        if not f[name].value:
            raise UserError(f"--{name} is missing: name the {'images' if name == 'source' else 'directory to write'}")
    process, num_processes = start(options.get_config())
    source = pictures.open_pictures(f.source, f.split, f.data_dir)
    files = autoencoder.read(f.vae)
    convention = conventions.CONVENTIONS.get(f.convention, units.RAW)
    plan = dataset.Plan(
        f.image_size, autoencoder.latent_shape(files, f.image_size), f.crop, f.batch_size, f.shard_size, f.flip,
        f.pixels, f.skip_broken,
    )  # fmt: skip
    vae = os.path.abspath(f.vae) if os.path.isdir(f.vae) else f.vae
    settings = {"vae": vae, "vae_digest": files.digest, "convention": conventions.to_dict(convention)}
    settings |= {"normalised": f.convention == OWN}
    encoder = make_encoder(files, convention.pixels, f.batch_size)
    missing = dataset.make(pathlib.Path(f.dest), source, encoder, plan, settings, process, num_processes)
    records.announce(f.dest, missing)
