"""Imports couplings of the official layout (Xinxi-Zhang/Re-MeanFlow) as a dataset; the reflow commands make new ones.

    python -m meanflow.commands.import_couplings SOURCE DEST [--labels FILE] [--shard_size N]

SOURCE holds NAME.npy, an image [c h w], and NAME_noise.npy, its noise.  FILE is a JSON file of labels: the official
index {"root": DIR, "file_list": ["1.npy", ...], "label_list": [3, ...]}, {"labels": [["00000.npy", 3], ...]} as EDM2's,
[["00000", 3], ...] or {"00000": 3, ...}.  With the official index SOURCE may be the folder of the index, too, and the
arrays in its subfolder `samples`, or wherever DIR says.
If the command is killed, rerun it: only the shard that it was writing is redone.
"""

import argparse

from meanflow import tensorflow_logging
from meanflow.config import paths
from meanflow.console_log import setup_logging
from meanflow.data.couplings import SHARD_SIZE, import_folder
from meanflow.data.label_files import INDEX
from meanflow.errors import UserError, exit_on_user_error


def main(argv: list[str] | None = None) -> None:
    """Run the command line.  Raises UserError for anything that cannot be imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", metavar="SOURCE", type=paths.read, help="folder of .npy files")
    add("dest", metavar="DEST", type=paths.written, help="directory of the dataset, new or unfinished")
    add("--labels", metavar="FILE", type=paths.read, help=f"default: SOURCE/{INDEX}")
    add("--shard_size", metavar="N", type=int, default=SHARD_SIZE, help=f"default: {SHARD_SIZE} pairs")
    args = parser.parse_args(argv)
    if args.shard_size < 1:
        raise UserError(f"--shard_size is {args.shard_size}; it must be at least 1")
    setup_logging()
    num = import_folder(args.source, args.dest, args.labels or args.source / INDEX, args.shard_size)
    print(f"{args.dest}: {num} pairs")


if __name__ == "__main__":
    tensorflow_logging.silence_tensorflow()
    with exit_on_user_error():
        main()
