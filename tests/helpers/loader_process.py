"""What the process that loads a batch is like."""

import sys
import threading

import numpy as np

MODULES = ("tensorflow", "tensorflow_datasets", "clu", "torch", "flax", "sklearn")


def describe(batch):
    """Return a batch with `modules`, which of MODULES are imported, and `watched`, whether it ends with its parent."""
    watched = any(thread.name == "end_with_parent" for thread in threading.enumerate())
    return batch | {"modules": np.array([name in sys.modules for name in MODULES]), "watched": np.array(watched)}
