"""Measures how far the two frameworks agree on a file of weights: the parity report of a folder for the hub."""

import copy
import json
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import numpy as np

import jax_impl
import torch_impl
from meanflow.commands.model import Model
from meanflow.config import options

ROWS, SEED = 4, 0
BOUND = 1e-4  # of the relative difference in float32; many times that of rounding in the published networks
INPUTS = f"{ROWS} rows of unit normals, uniform times and classes, seed {SEED}"


class Agreement(NamedTuple):
    """The largest difference of the velocities that JAX and PyTorch compute, absolute and relative to the largest."""

    difference: float
    relative: float
    inputs: str = INPUTS
    dtype: str = "float32"

    def to_json(self) -> str:
        """Return the report as one line of JSON."""
        return json.dumps(self._asdict())

    def __str__(self) -> str:
        return f"{self.relative:.1e} of the largest velocity, in {self.dtype} on the CPU, at {self.inputs}"


def measure(path: pathlib.Path, config: options.Config) -> Agreement:
    """Load canonical weights into both frameworks, one after the other, and compare their velocities.

    config: of the network; precision is float32 whatever it says.  Says on stderr if they differ by more than `BOUND`.
    """
    full: Any = copy.deepcopy(config)
    full.train.matmul_precision = "highest"
    full.model.update({name: "plain" for name in ("attention", "attention_jvp") if name in full.model})  # runs anywhere
    jax_u = velocity(jax_impl.load(path, config=full, device=jax.devices("cpu")[0], dtype="float32"))
    torch_u = velocity(torch_impl.load(path, config=full, device="cpu", dtype="float32"))
    difference = float(np.abs(jax_u - torch_u).max())
    found = Agreement(difference, difference / max(float(np.abs(torch_u).max()), sys.float_info.min))
    if not found.relative <= BOUND:  # NaN is not
        print(f"warning: the frameworks differ on {path} by {found}; run parity/check.py", file=sys.stderr)
    return found


def velocity(model: Model) -> np.ndarray:
    """Return a model's velocity at `INPUTS`, [b h w c]."""
    config: Any = model.config
    c, rng = config.model, np.random.RandomState(SEED)
    z = rng.normal(size=(ROWS, c.input_size, c.input_size, c.channels))
    r, t = np.sort(rng.uniform(size=(2, ROWS)), axis=0)
    return model.velocity(z.astype(np.float32), t, r, rng.randint(c.num_classes + 1, size=ROWS))
