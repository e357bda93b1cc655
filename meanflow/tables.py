"""Fixed tables of the networks: positions and resampling filters.  They are computed, never trained."""

import numpy as np


def position_table(grid_size, dim):
    """Return the fixed 2-D sin-cos table [grid_size^2, dim], float32, rows of the grid first.

    The first half of the channels encodes the column, the second half the row; each half is sines, then cosines.
    Source: Gsunshine/meanflow, models/models_dit.py (after MAE, arXiv:2111.06377).
    """
    omega = 10_000.0 ** (-np.arange(dim // 4, dtype=np.float64) / (dim // 4))
    angles = np.arange(grid_size, dtype=np.float64)[:, None] * omega
    one_axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    column = np.tile(one_axis, (grid_size, 1))
    row = np.repeat(one_axis, grid_size, axis=0)
    return np.concatenate([column, row], axis=-1).astype(np.float32)


def rotary_table(num_tokens, dim, max_period=10_000.0):
    """Return cosines and sines [num_tokens, dim/2], float64, of the angles n max_period^(-2i/dim) of token n."""
    angles = np.arange(num_tokens)[:, None] * max_period ** (-np.arange(0, dim, 2) / dim)
    return np.cos(angles), np.sin(angles)


def filter_table(taps):
    """Return the separable filter [1 1 k k] float32 with these k taps, as the canonical state dict has it."""
    taps = np.asarray(taps, np.float32)
    return (np.outer(taps, taps) / taps.sum() ** 2)[None, None]


def resample_matrix(taps, size, mode, valid=False):
    """Return the matrix [size' size] float64 that filters an axis of `size`, and halves (down) or doubles (up) it.

    valid: the axis is longer than `size` by as much as the filter reaches, so it is not padded.
    """
    reach = (len(taps) - 1) // 2
    if mode == "up":
        return 2 * halving_matrix(taps, 2 * size, reach).T
    return halving_matrix(taps, size + 2 * reach, 0) if valid else halving_matrix(taps, size, reach)


def halving_matrix(taps, size, padding):
    """Return the matrix [size', size] float64 that filters an axis with `taps`, normalised, and keeps every other.

    size' = (size + 2 padding - len(taps)) / 2 + 1, the axis being padded with zeros at both ends.
    """
    taps = np.asarray(taps, np.float64) / np.sum(taps)
    matrix = np.zeros(((size + 2 * padding - len(taps)) // 2 + 1, size + 2 * padding))
    for row, weights in enumerate(matrix):
        weights[2 * row : 2 * row + len(taps)] = taps
    return matrix[:, padding : padding + size]
