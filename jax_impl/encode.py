"""Encode images into a latent dataset for both trainers: folder, .zip or TFDS dataset to ArrayRecord.

    python -m jax_impl.encode --source=imagenet/train --dest=imagenet_latents
    python -m jax_impl.encode --source=imagenet.zip --dest=latents_512 --image_size=512 --convention=edm2

Run again with the same arguments to continue after a kill.  Train on it with --config.data.name=imagenet_latents.
Several processes share the work, each with its own shards: on SLURM or TPU pods add --distributed, elsewhere
--coordinator=HOST:PORT --num_processes=N --process=I to each.
"""

from jax_impl.autoencoder import make_encoder
from jax_impl.devices import define_flags, start_alone
from meanflow.commands import encode
from meanflow.config.flags import run
from meanflow.console_log import setup_logging


def main():
    """Read, encode, write."""
    setup_logging()
    encode.encode(start_alone, make_encoder)


if __name__ == "__main__":
    encode.define_flags()
    define_flags()
    run(main)
