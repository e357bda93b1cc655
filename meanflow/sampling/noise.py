"""Noise and labels of samples, the same in both frameworks and for any batch size."""

import numpy as np

DETERMINISTIC = ("euler", "heun", "velocity")  # samplers that use only the initial noise


def num_fresh(c):
    """Return how many steps of the sampler of `config.sample` add fresh noise: all but the last, or none."""
    return 0 if c.sampler in DETERMINISTIC else (len(c.times) - 1 if c.times else c.steps) - 1


def draw(indices, shape, num_classes, seed, num_fresh=0):
    """Return noise, labels and fresh noise of the samples `indices`.

    noise: unit normals float32 [n *shape].  labels: int32 [n] in [0, num_classes).  fresh noise: [num_fresh n *shape],
    None if num_fresh is 0.  Sample i depends only on (seed, i), not on batch size, devices or framework.
    """
    noise, labels = np.empty((len(indices), *shape), np.float32), np.empty(len(indices), np.int32)
    fresh = np.empty((num_fresh, *noise.shape), np.float32) if num_fresh else None
    for row, index in enumerate(indices):
        rng = np.random.Generator(np.random.Philox(key=[seed, index]))
        noise[row] = rng.standard_normal(shape, np.float32)
        labels[row] = rng.integers(num_classes)
        if fresh is not None:
            fresh[:, row] = rng.standard_normal((num_fresh, *shape), np.float32)
    return noise, labels, fresh


def in_dtype_of(config, noise):
    """Return noise in the dtype of a sampler's state: float64 if the model computes in float64, else float32."""
    return noise.astype("float64" if config.model.compute_dtype == "float64" else "float32")
