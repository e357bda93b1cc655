"""Noise and labels of generated images, the same in both frameworks and for any batching."""

import numpy as np


def draw(indices, shape, num_classes, seed):
    """Return unit normals float32 [n *shape] and labels int32 [n] in [0, num_classes) of the samples `indices`.

    Sample i depends on (seed, i) alone: neither batch size, nor number of devices, nor framework changes it.
    """
    noise, labels = np.empty((len(indices), *shape), np.float32), np.empty(len(indices), np.int32)
    for row, index in enumerate(indices):
        rng = np.random.Generator(np.random.Philox(key=[seed, index]))
        noise[row] = rng.standard_normal(shape, np.float32)
        labels[row] = rng.integers(num_classes)
    return noise, labels
