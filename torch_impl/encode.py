"""Encode images into a latent dataset for both trainers: folder, .zip or TFDS dataset to ArrayRecord.

    torchrun torch_impl/encode.py --source=imagenet/train --dest=imagenet_latents
    torchrun torch_impl/encode.py --source=imagenet.zip --dest=latents_512 --image_size=512 --convention=edm2
    torchrun --nproc_per_node=8 torch_impl/encode.py --source=imagenet/train --dest=imagenet_latents

Run again with the same arguments to continue after a kill.  Train on it with --config.data.name=imagenet_latents.
Several processes share the work, each with its own shards.
"""

from meanflow.commands import encode
from meanflow.config.flags import run
from meanflow.console_log import setup_logging
from torch_impl.autoencoder import make_encoder
from torch_impl.devices import start_alone


def main():
    """Read, encode, write."""
    setup_logging()
    encode.encode(start_alone, make_encoder)


if __name__ == "__main__":
    encode.define_flags()
    run(main)
