"""Imports other people's latents as a dataset of latents.

    python -m meanflow.commands.import_latents FORMAT SOURCE DEST [--convention NAME] [--vae NAME] [--labels FILE]

lmdb   LMDB of pickled dicts under the keys b"0", b"1", ...: `moments` [2c h w], perhaps `moments_flip`, and `label`;
       b"num_samples" is their number.  Moments are mean and log-variance (the PyTorch reproduction of MeanFlow).
pt     folder with a folder for each class and a .pt for each image: a dict with `moments` or `image`, perhaps
       `moments_flip` or `image_flip`, and perhaps `label`, or the tensor alone; [2c h w], [1 2c h w] or [h w 2c], mean
       and standard deviation (official MeanFlow and improved MeanFlow, in JAX).
edm2   folder or .zip of .npy [2c h w], mean and standard deviation, and dataset.json, {"labels": [["NAME.npy", 3],
       ...]} (EDM2, Re-MeanFlow; decoupled MeanFlow and REPA have the same with --convention sd).

Nothing in the files is executed.  If the command is killed, rerun it: only the shard that it was writing is redone.
"""

import argparse

from meanflow import tensorflow_logging
from meanflow.config import latents as conventions
from meanflow.config import paths
from meanflow.console_log import setup_logging
from meanflow.data.latents.dataset import SHARD_SIZE
from meanflow.data.latents.importers import FORMATS, LAYOUTS, MOMENTS, Format, Options, import_store
from meanflow.errors import UserError, exit_on_user_error


def main(argv: list[str] | None = None) -> None:
    """Run the command line.  Raises UserError for anything that cannot be imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("format", metavar="FORMAT", choices=FORMATS, help=", ".join(FORMATS))
    add("source", metavar="SOURCE", type=paths.read, help="directory, folder or .zip, see above")
    add("dest", metavar="DEST", type=paths.written, help="directory of the dataset, new or unfinished")
    defaults = {
        name: ", ".join(f"{key} {getattr(f, name)}" for key, f in FORMATS.items()) for name in Format._fields[1:]
    }
    known = conventions.CONVENTIONS
    add("--convention", choices=known, help=f"data units to train in; default: {defaults['convention']}")
    add("--vae", metavar="NAME", type=paths.expand, default="", help="the autoencoder that made them, to decode with")
    add("--labels", metavar="FILE", type=paths.read, help="JSON, [[NAME, LABEL], ...], instead of the store's labels")
    add("--moments", choices=MOMENTS, help=f"default: {defaults['moments']}")
    add("--layout", choices=LAYOUTS, help=f"auto: whichever makes latents square.  Default: {defaults['layout']}")
    add("--shard_size", metavar="N", type=int, default=SHARD_SIZE, help=f"default: {SHARD_SIZE} images")
    args = parser.parse_args(argv)
    if args.shard_size < 1:
        raise UserError(f"--shard_size is {args.shard_size}; it must be at least 1")
    setup_logging()
    own = FORMATS[args.format]
    convention = known[args.convention or own.convention]
    moments, layout = args.moments or own.moments, args.layout or own.layout
    options = Options(args.format, args.source, moments, layout, convention, args.vae, args.labels, args.shard_size)
    num = import_store(args.dest, options)
    print(f"{args.dest}: {num} latents of the convention {conventions.describe(convention)}")


if __name__ == "__main__":
    tensorflow_logging.silence_tensorflow()
    with exit_on_user_error():
        main()
