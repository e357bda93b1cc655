"""Writes the dataset of test_records.py, and kills itself in the middle of a shard; started by it.

    write_records.py DIRECTORY SHARD

SHARD: the number of the shard to die in.
"""

import os
import pathlib
import signal
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[3]))

from meanflow.data import records
from meanflow.data.record_reader import Feature

SHARDS = records.split_into_shards(23, 5)
SETTINGS = {"seed": 3, "scale": 0.5, "sizes": (1, 2)}


def layout(directory):
    """Return the layout."""
    features = {"image": Feature("array", (2, 2, 1)), "label": Feature("integer")}
    return records.Layout(pathlib.Path(directory), "numbers", features, len(SHARDS))


def of_shard(number):
    """Yield the records of a shard: record i is filled with i."""
    for i in SHARDS[number]:
        yield {"image": np.full((2, 2, 1), i, np.float32), "label": i}


def until(last):
    """Return a function like `of_shard` that ends this process after two records of the shard `last`."""

    def dying(number):
        for i, record in enumerate(of_shard(number)):
            if number == last and i == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield record

    return dying


if __name__ == "__main__":
    there = layout(sys.argv[1])
    records.begin(there, SETTINGS)
    records.write(there, until(int(sys.argv[2])))
