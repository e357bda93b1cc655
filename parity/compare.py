"""Compares two samples.npz: labels must be equal, and images within a bound.

python parity/compare.py A/samples.npz B/samples.npz --bound=1e-4
"""

import argparse
import sys

import numpy as np

from meanflow.config import paths
from meanflow.errors import UserError, exit_on_user_error


def read(path):
    """Return images [n h w c] and labels [n] of a samples.npz.  Raises UserError if it is not one."""
    try:
        with np.load(path) as samples:
            return samples["images"], samples["labels"]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} is not a samples.npz of the sample commands: {error}") from error


def difference(a, b):
    """Return the largest absolute difference of two (images, labels); inf on NaN or if shapes or labels differ."""
    if a[0].shape != b[0].shape or not np.array_equal(a[1], b[1]):
        return float("inf")
    largest = float(np.abs(a[0].astype(np.float64) - b[0]).max())
    return largest if np.isfinite(largest) else float("inf")


def main():
    """Print the difference; exit 1 if it exceeds the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=paths.read)
    parser.add_argument("second", type=paths.read)
    parser.add_argument("--bound", type=float, default=1e-4, help="largest absolute difference allowed")
    args = parser.parse_args()
    with exit_on_user_error():
        largest = difference(read(args.first), read(args.second))
    print(f"largest difference {largest:.2e}, bound {args.bound:.0e}: {'ok' if largest <= args.bound else 'FAILED'}")
    sys.exit(largest > args.bound)


if __name__ == "__main__":
    main()
