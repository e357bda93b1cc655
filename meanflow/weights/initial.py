"""Initial weights: the distribution of every canonical weight of every network, and one function that draws them.

A weight is a function of (seed, name, shape): the same in both frameworks, whatever else a network has.
"""

import fnmatch
import hashlib
import math
from collections.abc import Callable, Mapping

import numpy as np

# (generator, shape) -> float32 array of this shape.  Weights are [out in ...], embeddings [rows width].
Distribution = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def constant(value: float) -> Distribution:
    """Return the distribution of entries that all have this value."""
    return lambda rng, shape: np.full(shape, value, np.float32)


def normal(std: float) -> Distribution:
    """Return the normal distribution with this standard deviation."""
    return lambda rng, shape: _scaled(rng.standard_normal(shape, np.float32), std)


def normal_by_width(gain: float) -> Distribution:
    """Return the normal distribution of standard deviation gain / sqrt(last axis): inputs, or width of an embedding."""
    return lambda rng, shape: normal(gain / math.sqrt(shape[-1]))(rng, shape)


def uniform(high: float) -> Distribution:
    """Return the uniform distribution over [0, high)."""
    return lambda rng, shape: _scaled(rng.random(shape, np.float32), high)


def xavier(gain: float = 1.0) -> Distribution:
    """Return Xavier's uniform distribution times `gain`; the pixels of a kernel count in both fans."""
    return lambda rng, shape: _symmetric(rng, shape, gain, sum(shape[:2]) * math.prod(shape[2:]))


def xavier_of_patches(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw a kernel [out in k k] as the matrix (in k k) -> out, Xavier-uniform."""
    return _symmetric(rng, shape, 1.0, shape[0] + math.prod(shape[1:]))


def _symmetric(rng, shape, gain, fans):
    high = gain * math.sqrt(6 / fans)
    a = _scaled(rng.random(shape, np.float32), 2 * high)
    a -= np.float32(high)
    return a


def _scaled(a, factor):
    a *= np.float32(factor)  # in place: arrays are large
    return a


ZEROS, ONES = constant(0.0), constant(1.0)
Table = Mapping[str, Distribution]  # by pattern of names, in which * matches anything; the first that matches holds

# Source: Gsunshine/meanflow, models/models_dit.py and zhuyu-cs/MeanFlow, sit.py (adaLN-Zero, arXiv:2212.09748);
# kyungmnlee/dmf, models/sit.py and models/dmft.py.
TRANSFORMER: Table = {
    "*.bias": ZEROS,
    "x_embedder.proj.weight": xavier_of_patches,
    "[tr]_embedder.mlp.*.weight": normal(0.02),
    "y_embedder.embedding_table.weight": normal(0.02),
    "blocks.*.attn.[qk]_norm.scale": ONES,
    "blocks.*.attn.*.weight": xavier(),
    "blocks.*.mlp.*.weight": xavier(),
    "*.adaLN_modulation.1.weight": ZEROS,
    "final_layer.linear.weight": ZEROS,
}
# Source: Lyy-iiis/imeanflow, models/imfDiT.py.
IMPROVED_TRANSFORMER: Table = {
    "*.bias": ZEROS,
    "*_tokens": normal_by_width(1.0),
    "x_embedder.proj.weight": xavier_of_patches,
    "*_embedder.mlp.*.weight": normal_by_width(1.0),
    "y_embedder.embedding_table._flax_embedding.weight": normal_by_width(1.0),
    "*norm*.weight": ONES,
    "*_scale": ZEROS,
    "*.attn.*_proj.*.weight": normal_by_width(0.32),
    "*.mlp.w*.weight": normal_by_width(0.32),
    "*_final_layer.linear.*.weight": ZEROS,
}
# Source: NVlabs/edm, training/networks.py, SongUNet, as copied by Gsunshine/py-meanflow and zhuyu-cs/MeanFlow.
UNET: Table = {
    "*.bias": ZEROS,
    "map_noise.freqs": normal(16.0),
    "map_*.weight": xavier(),
    "*norm*.weight": ONES,
    "*.conv1.weight": xavier(1e-5),
    "*.qkv.weight": xavier(math.sqrt(0.2)),
    "*.proj.weight": xavier(1e-5),
    "dec.*_aux_conv.weight": xavier(1e-5),
    "*.affine.weight": xavier(),
    "*.conv0.weight": xavier(),
    "*.skip.weight": xavier(),
    "enc.*_conv.weight": xavier(),
    "enc.*_aux_*.weight": xavier(),
}
# Source: NVlabs/edm2, training/networks_edm2.py.  Each weight is normalised where it is used.
EDM2: Table = {
    "*.freqs": normal(2 * math.pi),
    "*.phases": uniform(2 * math.pi),
    "*_gain": ZEROS,
    "*.weight": normal(1.0),
}
NETWORKS: dict[str, Table] = {  # by config.model.name
    "dit": {**TRANSFORMER, "projectors.*.weight": xavier()},
    "dmf_dit": {**TRANSFORMER, "logvar_linear.weight": ZEROS},
    "imf_dit": IMPROVED_TRANSFORMER,
    "unet": UNET,
    "edm2": EDM2,
}


def draw(network: str, shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Return fresh canonical weights {name: float32 array} of these shapes.  network: a name of `NETWORKS`.

    Raises ValueError for a name whose distribution is not declared.
    """
    return {name: distribution(network, name)(generator(seed, name), shape) for name, shape in shapes.items()}


def distribution(network: str, name: str) -> Distribution:
    """Return the distribution of a canonical weight.  Raises ValueError if none is declared."""
    pattern = pattern_of(network, name)
    if pattern is None:
        raise ValueError(f"no pattern of initial.NETWORKS[{network!r}] (meanflow/weights) matches {name}: add one")
    return NETWORKS[network][pattern]


def pattern_of(network: str, name: str) -> str | None:
    """Return the first pattern of the network's table that matches a canonical name."""
    return next((pattern for pattern in NETWORKS[network] if fnmatch.fnmatchcase(name, pattern)), None)


def generator(seed: int, name: str) -> np.random.Generator:
    """Return the random generator of a weight.

    Its key has the highest bit set, which keys of `meanflow.sampling.noise`, (seed, index of the sample), have not.
    """
    checksum = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return np.random.Generator(np.random.Philox(key=np.array([seed, checksum | 1 << 63], np.uint64)))
