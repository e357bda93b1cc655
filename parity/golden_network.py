"""What the fixtures of transformers have in common: build both networks, compare, and check initial weights."""

import numpy as np

from configs import base
from parity.checks import Measure
from parity.frameworks import FRAMEWORKS

BOUND = 2e-5  # float32 against float32 of another kernel, relative: the fixtures' own spread is 6e-6
# A gradient whose norm is below this share of the norm of all is a near-cancellation and carries more rounding.
TINY_SHARE, TINY_BOUND = 1e-2, 1e-4
SEEDS = range(12)  # fresh networks pooled for the statistics of initial weights
UNIFORM = 1.8  # largest over standard deviation: sqrt(3) for uniforms, well above 2 for so many normals


def config_of(net: dict):
    """Return our config of a network that the official code describes by `net`."""
    config = base.get_config()
    config.model.update(
        input_size=net["input_size"], channels=net["in_channels"], num_classes=net["num_classes"],
        patch_size=net["patch_size"], depth=net["depth"], width=net["hidden_size"], num_heads=net["num_heads"],
        mlp_ratio=float(net["mlp_ratio"]), compute_dtype="float32",
    )  # fmt: skip
    return config


def nets(config, weights: dict) -> list[tuple]:
    """Return (name, framework, network) for each framework, with canonical weights."""
    return [(name, f, f.build(config, weights)) for name, f in FRAMEWORKS.items()]


def compare_gradients(measure: Measure, framework: str, got: dict, want: dict) -> None:
    """Compare gradients by canonical name: `TINY_BOUND` for those of a tiny norm, `BOUND` for the others."""
    # The official code stores no gradient of what receives none; ours must then be exactly 0.
    got = {name: grad for name, grad in got.items() if name in want or np.any(grad)}
    whole = np.sqrt(sum(np.square(grad, dtype=np.float64).sum() for grad in want.values()))

    def bound(name):
        return TINY_BOUND if np.linalg.norm(want[name]) < TINY_SHARE * whole else BOUND

    measure.compare_worst(framework, "grad", got, want, bound)


def compare_initial(measure: Measure, config, want: dict) -> None:
    """Compare the [mean, std, min, max] of fresh weights with those of the official networks, by canonical name.

    Statistical, for random weights of n entries: means within 6 standard errors, standard deviations within 5 % (and
    6 standard errors), the range of uniforms within 5 %, that of normals, whose tails are rare, within 30 %.
    """
    for framework, f in FRAMEWORKS.items():
        drawn = f.fresh_weights(config, SEEDS)
        if drawn[0].keys() != want.keys():
            names = ", ".join(sorted(drawn[0].keys() ^ want.keys())[:3])
            measure.add(framework, f"initial weights (only on one side: {names})", np.inf, 0.0)
            continue
        pooled = {name: np.concatenate([weights[name].ravel() for weights in drawn]) for name in want}
        fixed = [name for name in want if np.ptp(pooled[name]) == 0 or np.array_equal(drawn[0][name], drawn[1][name])]
        statistics = {name: [a.mean(), a.std(), a.min(), a.max()] for name, a in pooled.items()}
        measure.compare_worst(
            framework, "initial constants",
            {name: np.array(statistics[name]) for name in fixed}, {name: want[name] for name in fixed}, 1e-5,
        )  # fmt: skip
        for name in want.keys() - set(fixed):
            compare_random(measure, f"{framework}", name, pooled[name], want[name])


def compare_random(measure: Measure, framework: str, name: str, pooled: np.ndarray, want: np.ndarray) -> None:
    """Compare the statistics of one random weight; errors are shares of its standard deviation or range."""
    mean, std, low, high = (float(a) for a in want)
    error = 6 / np.sqrt(pooled.size)
    measure.add(framework, f"initial mean over std ({name})", abs(pooled.mean() - mean) / (std or np.inf), 2 * error)
    measure.add(framework, f"initial std ({name})", abs(pooled.std() / (std or np.nan) - 1), max(0.05, error))
    spread = max(abs(pooled.min() / (low or np.nan) - 1), abs(pooled.max() / (high or np.nan) - 1))
    measure.add(framework, f"initial range ({name})", spread, 0.05 if high / std < UNIFORM else 0.3)
