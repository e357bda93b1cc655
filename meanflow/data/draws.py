"""All the randomness of a training step, as NumPy arrays, the same in both frameworks.

A draw depends only on (seed, step, row) and its name: not on what was drawn before, nor on the framework, the number of
processes, devices and micro-batches, or the batch size.  So a resumed run replays its draws, in either framework.

They are made where batches are loaded, while the accelerator computes: 1.5 ms for 32 rows of 32x32x4, 4.8 ms for 128 of
32x32x3 on one core, beside steps of some 200 ms.  So the device need not draw them, which would take a generator with
equal integers, and the same inverse error function, in both frameworks.

Philox: J. K. Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
"""

import zlib
from typing import Any, NamedTuple

import numpy as np

from meanflow.config import options

PREFIX = "draws."  # of their names in a batch
STREAM = 2**63  # the second word of the key; that of other generators in this project is an index


class Kind(NamedTuple):
    """A distribution, and what of it a row has: one number, several (`shape`), or an image."""

    distribution: str  # uniform in [0, 1) | normal: mean 0, deviation 1 | time: normal, or as method.time_sampler says
    shape: tuple[int, ...] | None = ()  # None: that of the image


UNIFORM, NORMAL, TIME, TIMES, IMAGE = (
    Kind("uniform"), Kind("normal"), Kind("time"), Kind("time", (2,)), Kind("normal", None),
)  # fmt: skip
# What each method draws; its `Draws` says what for.
METHODS = {
    "meanflow": {"noise": IMAGE, "times": TIMES, "coin": UNIFORM, "drop": UNIFORM, "dropout": UNIFORM},
    "improved": {
        "noise": IMAGE, "times": TIMES, "coin": UNIFORM, "drop": UNIFORM, "omega": UNIFORM, "t_min": UNIFORM,
        "t_max": UNIFORM,
    },
    "flow": {"noise": IMAGE, "times": TIME, "drop": UNIFORM},
    "decoupled": {"noise": IMAGE, "noise_flow": IMAGE, "times": TIMES, "times_flow": TIME, "drop": UNIFORM},
    "rectified": {
        "times": UNIFORM, "second": UNIFORM, "interval": NORMAL, "coin": UNIFORM, "drop": UNIFORM, "omega": UNIFORM,
    },
}  # fmt: skip


def draw(
    cfg: options.Config, shape: tuple[int, ...], seed: int = 0, step: int = 0, rows: slice = slice(None)
) -> dict[str, np.ndarray]:
    """Return the draws {name: float32 [b ...]} of the method for some rows of a batch, arranged (see `arrange`).

    cfg: `config.method`.  shape: of the images of the whole batch, (b h w c).  seed: in [0, 2^64).  step: steps taken
    before.  rows: without a stride; the others' images are not drawn.
    """
    num, image = shape[0], shape[1:]
    kinds = METHODS[cfg.name]
    drawn = {name: _rows(kind, cfg, num, (seed, step, name)) for name, kind in kinds.items() if kind != IMAGE}
    drawn = {name: a[rows] for name, a in arrange(drawn, cfg).items()}
    images = {name: _images(range(num)[rows], image, (seed, step, name)) for name in kinds if kinds[name] == IMAGE}
    return {name: images[name] if name in images else drawn[name] for name in kinds}


def of_process(config: options.Config, step: int, process: tuple[int, int] = (0, 1)) -> dict[str, np.ndarray]:
    """Return the draws of a training step as a part of its batch, {PREFIX + name: float32 [b ...]}.

    process: (p, n) has the p-th of n equal, contiguous parts of the rows, as of the data.
    """
    c, (index, num_processes) = config.model, process
    num = config.train.batch_size // num_processes
    shape = config.train.batch_size, c.input_size, c.input_size, c.channels
    drawn = draw(config.method, shape, config.seed, step, slice(index * num, (index + 1) * num))
    return {PREFIX + name: a for name, a in drawn.items()}


def split(batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the data and the draws in a batch, each by name."""
    drawn = {name.removeprefix(PREFIX): a for name, a in batch.items() if name.startswith(PREFIX)}
    return {name: a for name, a in batch.items() if not name.startswith(PREFIX)}, drawn


def arrange(draws: dict[str, Any], cfg: Any) -> dict[str, Any]:
    """Return the draws of a whole batch, rearranged so that `front` rows, if any, are the first ones.

    `front`, of flow rows or dropped labels, then works as `coin`: what happens to a row follows from its own draws,
    however the batch is divided among devices and micro-batches.
    """
    coin, drop = draws.get("coin"), draws.get("drop")
    if coin is not None and cfg.flow_rows == "front":
        num_flow = int(len(coin) * cfg.flow_fraction)
        draws = draws | {"coin": (np.arange(len(coin)) >= num_flow).astype(coin.dtype)}
    return draws | {"drop": np.sort(drop)} if drop is not None and cfg.label_drop == "front" else draws


def _rows(kind, cfg, num, where):
    """Return draws of a whole batch [num ...]: whichever rows are needed, they cost nothing beside images."""
    uniform = kind.distribution == "uniform" or (kind.distribution == "time" and cfg.time_sampler == "uniform")
    rng, shape = _generator(*where), (num, *kind.shape)
    return rng.random(shape, np.float32) if uniform else rng.standard_normal(shape, np.float32)


def _images(rows, shape, where):
    """Return unit normals [rows *shape]; each row has a generator."""
    images = np.empty((len(rows), *shape), np.float32)
    for i, row in enumerate(rows):
        _generator(*where, row=row).standard_normal(shape, np.float32, images[i])
    return images


def _generator(seed, step, name, row=0):
    """Return the generator of a draw; it has 2^64 blocks of its own."""
    counter = [0, zlib.crc32(name.encode()), step, row]
    return np.random.Generator(np.random.Philox(counter=counter, key=[seed, STREAM]))
