"""Noise and labels of generated images, the same in both frameworks and for any batching."""

import numpy as np

DETERMINISTIC = ("euler", "heun", "velocity")  # samplers that draw no noise but the first


def num_fresh(c):
    """Return how many times the sampler of `config.sample` draws noise anew: in every step but the last."""
    return 0 if c.sampler in DETERMINISTIC else (len(c.times) - 1 if c.times else c.steps) - 1


def draw(indices, shape, num_classes, seed, num_fresh=0):
    """Return the noise and labels of the samples `indices`: unit normals, and labels int32 [n] in [0, num_classes).

    The noise is float32 [n *shape], and that which is drawn anew [num_fresh n *shape], None if num_fresh is 0.
    Sample i depends on (seed, i) alone: neither batch size, nor number of devices, nor framework changes it.
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
    """Return noise in the dtype that a sampler's state keeps: float64 if the model computes in it, else float32."""
    return noise.astype("float64" if config.model.compute_dtype == "float64" else "float32")
