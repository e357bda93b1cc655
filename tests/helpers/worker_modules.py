"""What the process that loads a batch has imported."""

import sys

import numpy as np

NAMES = ("tensorflow", "tensorflow_datasets", "clu", "torch", "flax", "sklearn")


def note(batch):
    """Return a batch with `modules`, bools: which of NAMES this process has imported."""
    return batch | {"modules": np.array([name in sys.modules for name in NAMES])}
