"""Precision lost in float32 and bfloat16: each framework against the float64 result, and the two against each other."""

import functools

import numpy as np

from parity.adapters.frameworks import FRAMEWORKS
from parity.cases import objectives, settings
from parity.checks import Case, Measure

# Largest relative error by (data type, kind of quantity): five times the largest of two settings measured on an
# x86 CPU.  float32: 6e-7, 1.7e-6 and 1.8e-6.  bfloat16, whose own rounding is 4e-3: 7e-3, 1.8e-2 and 2.4e-2.
BOUNDS = {
    "float32": {"value": 3e-6, "derivative": 9e-6, "gradient": 9e-6},
    "bfloat16": {"value": 3.5e-2, "derivative": 9e-2, "gradient": 1.2e-1},
}
POWER = {"adaptive_power": 0.75}  # p = 1 would make every row's loss 1
METHODS = {
    "dit": settings.SETTINGS["coin/kappa"] | POWER, "unet": settings.SETTINGS["coin/kappa"] | POWER,
    "imf": settings.NETWORK_SETTINGS["imf/split"] | POWER, "dmf": settings.NETWORK_SETTINGS["dmf/mg"],
    "edm2": settings.NETWORK_SETTINGS["edm2/re2"],
    "dmf_fused": settings.NETWORK_SETTINGS["dmf/mg"], "dmf_sit": settings.NETWORK_SETTINGS["dmf_sit/repa"],
}  # fmt: skip
# Networks in addition to those of `cases`: a fused kernel's softmax is float32, so it has no float64 result.
FUSED = {"dmf_fused": "dmf"}
VALUES = (
    "v_g", "v_c", "v_g_flow", "u", "u_flow", "v_head", "target", "compound", "err", "err_v", "err_flow", "weight",
    "row_loss", "row_loss_v", "row_loss_flow",
)  # fmt: skip


def all_cases() -> list[Case]:
    """Return the cases in float32 and bfloat16."""
    return [
        Case(f"{dtype}/{name}", functools.partial(compare, dtype, architecture, function), f"{dtype} {architecture}")
        for dtype in BOUNDS
        for name, architecture, function in (
            ("network", "dit", network),
            ("loss", "dit", loss),
            ("sample", "dit", sample),
            ("unet/network", "unet", network),
            ("imf/network", "imf", network),
            ("imf/loss", "imf", loss),
            ("dmf/network", "dmf", network),
            ("dmf/loss", "dmf", loss),
            ("dmf_fused/loss", "dmf_fused", loss),
            ("dmf_fused/sample", "dmf_fused", sample),
            ("dmf_sit/loss", "dmf_sit", loss),
            ("edm2/network", "edm2", network),
            ("edm2/loss", "edm2", loss),
        )
    ]


def compare(dtype: str, architecture: str, function, measure: Measure) -> None:
    """Measure the results of `function`, {(kind, quantity): array or dict of arrays}, in `dtype`.

    The float64 result is PyTorch's; the cases in float64 show that JAX's is the same.
    """
    want = result_of(function, architecture, "torch", "float64")
    got = {name: result_of(function, architecture, name, dtype) for name in FRAMEWORKS}
    pairs = (("jax", got["jax"], want), ("torch", got["torch"], want), ("jax-torch", got["jax"], got["torch"]))
    for kind, quantity in want:
        for name, ours, reference in pairs:
            by_name = isinstance(reference[kind, quantity], dict)
            record = measure.compare_worst if by_name else measure.compare
            record(name, quantity, ours[kind, quantity], reference[kind, quantity], BOUNDS[dtype][kind])


def result_of(function, architecture: str, framework: str, dtype: str) -> dict:
    """Return the results of `function` for one tiny network in one framework and data type."""
    model = {"compute_dtype": dtype}
    if architecture in FUSED and dtype != "float64":
        model["attention"] = "fused"
    network, setting = FUSED.get(architecture, architecture), METHODS[architecture]
    config = objectives.config(network, model=model, method=setting, sample={"steps": 2})
    f = FRAMEWORKS[framework]
    return function(f, f.build(config, objectives.random_weights(config), as_trained=dtype != "float64"), config)


def network(f, net, config) -> dict:
    """u and du/dt of the bare network."""
    inputs, given = objectives.jvp_inputs(config), objectives.given(config)
    u, du_dt = f.jvp(net, *inputs, given)
    forward = f.forward(net, *inputs[:4], given)
    return {("value", "forward u"): forward, ("value", "u"): u, ("derivative", "du_dt"): du_dt}


def loss(f, net, config) -> dict:
    """The intermediates of the loss, the worst gradient, and all gradients as one vector."""
    _, aux, grads = f.loss(net, *objectives.batch(config), config.method)
    result = {("value", key): aux[key] for key in VALUES if key in aux}
    result |= {("derivative", "du_dt"): aux["du_dt"]} if "du_dt" in aux else {}
    whole = np.concatenate([grads[name].ravel() for name in sorted(grads)])
    return result | {("gradient", "grad"): grads, ("gradient", "grad (as a whole)"): whole}


def sample(f, net, config) -> dict:
    """Images after two steps."""
    rows, draws = objectives.batch(config)
    return {("value", "samples"): f.sample(net, draws["noise"], rows["label"], config.sample)}
