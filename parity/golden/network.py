"""Shared by the network fixtures: builds both networks, compares gradients, and checks initial weights."""

import numpy as np

from meanflow.config import options
from meanflow.errors import UserError
from parity.adapters.frameworks import FRAMEWORKS
from parity.checks import Measure

BOUND = 2e-5  # relative, float32 against float32 from other kernels; the fixtures' own spread is 6e-6
# A gradient whose norm is below this fraction of the global norm nearly cancels and carries more rounding.
TINY_SHARE, TINY_BOUND = 1e-2, 1e-4
# So does this one at any norm: its terms are 1 - x / (x + eps) with x far above eps; two kernels differ by 5e-5.
CANCELLING = "logvar_linear."
SEEDS = range(40)  # fresh networks pooled for the statistics of initial weights, as many as in the fixtures
UNIFORM = 1.8  # maximum / standard deviation: sqrt(3) for uniforms, well above 2 for so many normals


def config_of(net: dict, network: str = "dit", method: str = "meanflow"):
    """Return our config for the official description `net` of a transformer; network, method: our names."""
    config = options.get_config(network, method)
    config.model.update(
        input_size=net["input_size"], channels=net["in_channels"], num_classes=net["num_classes"],
        patch_size=net["patch_size"], depth=net["depth"], width=net["hidden_size"], num_heads=net["num_heads"],
        mlp_ratio=float(net["mlp_ratio"]), compute_dtype="float32",
    )  # fmt: skip
    return config


def expect(settings: dict, **fixed) -> None:
    """Raise UserError if the fixture has a setting other than in `fixed`, the only values that ours supports."""
    for name, value in fixed.items():
        if settings.get(name, value) != value:
            raise UserError(f"the fixture has {name} = {settings[name]!r}, but ours has only {value!r}")


def nets(config, weights: dict) -> list[tuple]:
    """Return (name, framework, network) for each framework, with canonical weights."""
    return [(name, f, f.build(config, weights)) for name, f in FRAMEWORKS.items()]


def nhwc(a: np.ndarray) -> np.ndarray:
    """Return images [b c h w] as [b h w c]; leave other arrays unchanged."""
    return a.transpose(0, 2, 3, 1) if a.ndim == 4 else a


def compare_gradients(measure: Measure, framework: str, got: dict, want: dict) -> None:
    """Compare gradients by canonical name: `TINY_BOUND` for those that nearly cancel, `BOUND` for the others."""
    # The official code stores no gradient for parameters that receive none; ours must then be exactly 0.
    got = {name: grad for name, grad in got.items() if name in want or np.any(grad)}
    whole = np.sqrt(sum(np.square(grad, dtype=np.float64).sum() for grad in want.values()))

    def bound(name):
        tiny = np.linalg.norm(want[name]) < TINY_SHARE * whole
        return TINY_BOUND if tiny or name.startswith(CANCELLING) else BOUND

    measure.compare_worst(framework, "grad", got, want, bound)


def compare_initial(measure: Measure, config, want: dict) -> None:
    """Compare the [mean, std, min, max] of fresh weights with those of the official networks, by canonical name.

    Constants must agree up to rounding.  Random weights must agree statistically, with errors relative to the official
    standard deviation or range: means within 12 standard errors, standard deviations within 5 % (6 standard errors if
    that is more), the range of uniforms within 5 %, that of normals, whose tails are rare, within 50 %; the bounds on
    the range are looser for few entries.
    """
    for framework, f in FRAMEWORKS.items():
        drawn = f.fresh_weights(config, SEEDS)
        # Official Flax trees leave out the fixed tables; where present, they are compared as constants.
        tables = f.tables(f.build(config, drawn[0]))
        pooled = {
            name: np.stack([weights[name].ravel() for weights in drawn])
            for name in drawn[0]
            if name in want or name not in tables
        }
        if pooled.keys() != want.keys():
            measure.compare_worst(framework, "initial weights", pooled, want, 0.0)
            continue
        fixed = {name for name, a in pooled.items() if (a == a[0]).all()}
        constants = {name: statistics(pooled[name]) for name in fixed}
        measure.compare_worst(framework, "initial constants", constants, {name: want[name] for name in fixed}, BOUND)
        deviations = {name: deviation(pooled[name], want[name]) for name in sorted(want.keys() - fixed)}
        for i, quantity in enumerate(("mean", "std", "range")):
            worst = max(deviations, key=lambda name, i=i: deviations[name][i][0] / deviations[name][i][1])
            measure.add(framework, f"initial {quantity} (worst: {worst})", *deviations[worst][i])


def statistics(a: np.ndarray) -> np.ndarray:
    """Return [mean, std, min, max] of all entries."""
    return np.array([a.mean(dtype=np.float64), a.std(dtype=np.float64), a.min(), a.max()])


def deviation(pooled: np.ndarray, want: np.ndarray) -> list[tuple[float, float]]:
    """Return (error, bound) of the mean, the standard deviation and the range of one random weight."""
    mean, std, low, high = statistics(pooled)
    if not want[1]:
        return [(np.inf, 1.0)] * 3  # the official one is constant
    error = 6 / np.sqrt(pooled.size)
    num = max(pooled.size / 4, 2)
    uniform = (want[3] - want[2]) / want[1] < 2 * UNIFORM
    spread = max(abs(low - want[2]), abs(high - want[3])) / (want[3] - want[2]) * 2
    return [
        (abs(mean - want[0]) / want[1], 2 * error),
        (abs(std / want[1] - 1), max(0.05, error)),
        # The extremes of few entries vary more, and there may be only a quarter as many official networks as ours.  The
        # least of n uniforms is about 1/n of the range from its end; the largest of n normals is near sqrt(2 log n) and
        # exceeds that by x / sqrt(2 log n) with probability exp(-x); x = 10 is allowed.
        (spread, max(0.05, 100 / pooled.size) if uniform else max(0.5, (np.log(4) + 10) / (2 * np.log(num)))),
    ]
