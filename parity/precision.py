"""What float32 and bfloat16 lose: each framework against the float64 result, and the two against each other."""

import functools

import numpy as np

from parity import cases
from parity.checks import Case, Measure
from parity.frameworks import FRAMEWORKS

BOUNDS = {"float32": {}, "bfloat16": {}}


def all_cases() -> list[Case]:
    """Return the cases in float32 and bfloat16."""
    return [Case(f"{dtype}/{name}", functools.partial(run, dtype)) for dtype in BOUNDS for name in ("coin",)]


def run(dtype: str, measure: Measure) -> None:
    want = quantities("torch", "float64")
    got = {name: quantities(name, dtype) for name in FRAMEWORKS}
    for q in want:
        fn = measure.compare_worst if isinstance(want[q], dict) else measure.compare
        for name in FRAMEWORKS: fn(name, q, got[name][q], want[q], 1.0)
        fn("jax-torch", q, got["jax"][q], got["torch"][q], 1.0)


def quantities(framework: str, dtype: str) -> dict:
    cfg = cases.config(model={"compute_dtype": dtype}, method=cases.SETTINGS["coin/kappa"] | {"adaptive_power": 0.75})
    f = FRAMEWORKS[framework]
    net = f.build(cfg, cases.random_weights())
    z, t, r, y, v = cases.jvp_inputs()
    result = {"forward u": f.forward(net, z, t, r, y)}
    result["jvp u"], result["jvp du_dt"] = f.jvp(net, z, t, r, y, v)
    x, y, draws = cases.batch()
    _, aux, grads = f.loss(net, x, y, draws, cfg.method)
    result |= {k: aux[k] for k in ("v_g", "u", "du_dt", "target", "err", "weight", "row_loss")}
    result["grad"] = grads
    result["grad all"] = np.concatenate([grads[k].ravel() for k in sorted(grads)])
    cfg.sample.steps=2
    result["samples"] = f.sample(net, draws[0], y, cfg.sample)
    return result
