"""Fixtures of Lyy-iiis/imeanflow, JAX and PyTorch branches: imf.py, models/imfDiT.py.

In our terms: flow rows and dropped labels are the first rows of the batch.  The PyTorch branch only samples, without
the v head; its rotary positions lose the tangents of queries and keys, which ours keep.
"""

import re

import numpy as np

from meanflow.config import options
from meanflow.errors import UserError
from meanflow.weights.names import canonical_name, flax_tree_to_canonical
from parity.checks import Measure, relative_error
from parity.golden import network
from parity.golden.network import BOUND

# Intermediates of the loss: official name -> ours.
INTERMEDIATES = {
    "t": "t", "r": "r", "omega": "omega", "t_min": "t_min", "t_max": "t_max", "v_g": "v_g", "v_c": "v_c", "u": "u",
    "v": "v_head", "du_dt": "du_dt", "V": "compound", "adp_loss_u": "row_loss", "adp_loss_v": "row_loss_v",
}  # fmt: skip
LOST_TANGENT = 1e-2  # least relative distance of du/dt from the official PyTorch code's


def groups(fixture) -> list[str]:
    """Return the cases that the fixture must have."""
    losses = [f"loss/{case}" for case in fixture.config.get("cases", ())]
    return ["rope_real", "rope_imag", "fwd", "jvp", "init", *losses]


def config_of(fixture) -> options.Config:
    """Return our config for the fixture's network."""
    net, top, common = (fixture.config.get(key, {}) for key in ("net", "top", "base"))
    sizes = net | {"input_size": top.get("img_size"), "in_channels": top.get("img_channels")} if top else net
    sizes = sizes | {"num_classes": (top or common)["num_classes"]}
    config = network.config_of(sizes, "imf_dit", "improved")
    config.model.update(
        head_depth=net["aux_head_depth"], num_class_tokens=net["num_class_tokens"],
        num_omega_tokens=net["num_cfg_tokens"], num_interval_tokens=net["num_interval_tokens"],
        num_time_tokens=net["num_time_tokens"],
    )  # fmt: skip
    config.model.v_heads = any("v_heads" in key for key in fixture.arrays if key.startswith("param/"))
    guidance = fixture.config["sample"]
    config.sample.update(omega=guidance["omega"], interval=(guidance["t_min"], guidance["t_max"]))
    return config


def canonical(fixture, prefix: str) -> dict[str, np.ndarray]:
    """Return the arrays under a prefix by canonical name."""
    arrays = fixture.under(prefix)
    if is_flax(fixture):
        return flax_tree_to_canonical(arrays)
    return {name.removeprefix("net."): a for name, a in arrays.items()}


def is_flax(fixture) -> bool:
    """Return whether the fixture is from the JAX branch, whose images are NHWC."""
    return fixture.config["layout"] == "NHWC"


def images(fixture, key: str) -> np.ndarray:
    """Return an array of the fixture; images as [b h w c]."""
    return fixture.get(key) if is_flax(fixture) else network.nhwc(fixture.get(key))


def nets(fixture, v_heads: bool = True) -> tuple:
    """Return the config and the networks with the fixture's weights; v_heads: keep the v head, if there is one."""
    config, weights = config_of(fixture), canonical(fixture, "param/")
    if not v_heads:
        config.model.v_heads = False
        weights = {name: a for name, a in weights.items() if not name.startswith("v_heads.")}
    return config, network.nets(config, weights)


def given(fixture, group: str) -> dict[str, np.ndarray]:
    """Return the network's guidance inputs."""
    return {name: fixture.get(f"in/{group}/{name}") for name in ("omega", "t_min", "t_max")}


def rotary(part: int):
    """Return the runner for the cosines (0) or the sines (1) of rotary positions."""

    def run(fixture, measure: Measure) -> None:
        key = f"rope_{('real', 'imag')[part]}"
        for name, f, net in nets(fixture)[1]:
            measure.compare(name, key, f.rotary_table(net)[part], fixture.get(f"out/{key}"), BOUND)

    return run


def forward(fixture, measure: Measure) -> None:
    """u and v, with the v head and (u_eval, v_eval) without it."""
    x, t, h, y = (images(fixture, f"in/fwd/{key}") for key in ("x", "t", "h", "y"))
    cases = {"u": ("u", True), "v": ("v", True)}
    cases |= {"u_eval": ("u", False), "v_eval": ("v", False)} if is_flax(fixture) else {}
    for key, (head, v_heads) in cases.items():
        for name, f, net in nets(fixture, v_heads)[1]:
            got = f.forward(net, x, t, t - h, y, given(fixture, "fwd"), head)
            measure.compare(name, key, got, images(fixture, f"out/fwd/{key}"), BOUND)


def jvp(fixture, measure: Measure) -> None:
    """Both heads and their derivatives along (v_g, 1, 0); du/dt must differ from the unmodified PyTorch code's."""
    inputs = [images(fixture, f"in/jvp/{key}") for key in ("z", "t", "r", "y", "v_g")]
    for name, f, net in nets(fixture)[1]:
        for head in "uv" if is_flax(fixture) else "u":
            for key, got in zip((head, f"d{head}_dt"), f.jvp(net, *inputs, given(fixture, "jvp"), head), strict=True):
                measure.compare(name, key, got, images(fixture, f"out/jvp/{key}"), BOUND)
        if not is_flax(fixture):
            literal = images(fixture, "out/jvp/du_dt_literal")
            distance = relative_error(f.jvp(net, *inputs, given(fixture, "jvp"))[1], literal)
            closeness = 1 / distance if distance else np.inf
            measure.add(name, "1 / distance of du_dt from du_dt_literal", closeness, 1 / LOST_TANGENT)


def loss(fixture, case: str, measure: Measure) -> None:
    """Every intermediate of the loss, and its gradients where the fixture has them."""
    config, built = nets(fixture)
    config.method.update(method_of(fixture, fixture.config["cases"][case]))
    x, y, noise, n_t, n_r = (images(fixture, f"in/loss/{key}") for key in ("x", "y", "e", "n_t", "n_r"))
    uniforms = {"drop": "drop_u", "omega": "u_omega", "t_min": "u_tmin", "t_max": "u_tmax"}
    draws = {ours: fixture.get(f"in/loss/{key}") for ours, key in uniforms.items()}
    # The official run replaced two of the stored draws: omega = 1, no label dropped.
    if case == "noguid" or f"{case}_overrides" in fixture.config:
        draws |= {"omega": np.zeros_like(draws["omega"]), "drop": np.ones_like(draws["drop"])}
    draws |= {"noise": noise, "times": np.stack([n_t, n_r], axis=1), "coin": draws["drop"]}
    prefix = f"out/loss/{case}/"
    for name, f, net in built:
        value, aux, grads = f.loss(net, {"image": x, "label": y}, draws, config.method)
        measure.equal(name, "labels", aux["y"], fixture.get(prefix + "labels"))
        measure.equal(name, "fm_mask", aux["r"] == aux["t"], fixture.get(prefix + "fm_mask"))
        for key, ours in INTERMEDIATES.items():
            measure.compare(name, key, aux[ours], fixture.get(prefix + key), BOUND)
        for key, ours in (("loss_u", "compound"), ("loss_v", "v_head")):
            error = np.square(aux[ours] - aux["v_g"]).mean()
            measure.compare(name, key, error, fixture.get(prefix + key), BOUND)
        measure.compare(name, "loss", value, fixture.get(prefix + "loss"), BOUND)
        if any(key.startswith(f"grad/{case}/") for key in fixture.arrays):
            network.compare_gradients(measure, name, grads, canonical(fixture, f"grad/{case}/"))


def method_of(fixture, settings: dict) -> dict:
    """Return our config.method options for the official ones."""
    settings = fixture.config["base"] | settings
    return {
        "path": "linear", "time_sampler": "logit_normal", "time_mean": (settings["P_mean"],) * 2,
        "time_std": (settings["P_std"],) * 2, "flow_rows": "front", "flow_fraction": settings["data_proportion"],
        "label_drop": "front", "label_drop_prob": settings["class_dropout_prob"], "guidance": True,
        "omega_max": 1 + fixture.config["s_max"], "omega_power": settings["cfg_beta"], "weighting": "adaptive",
        "adaptive_power": settings["norm_p"], "adaptive_eps": settings["norm_eps"],
    }  # fmt: skip


def sample(fixture, case: str, measure: Measure) -> None:
    """stepsN; stepsN_sample_idxK: labels (0, 1, ...) + K b modulo classes; one_step_iI_ofN: step I of N alone."""
    match = re.fullmatch(r"steps(\d+)(?:_sample_idx(\d+))?|one_step_i(\d+)_of(\d+)", case)
    if match is None:
        raise UserError(f"the sampling case {case} is none of stepsN, stepsN_sample_idxK and one_step_iI_ofN")
    config, built = nets(fixture, v_heads=False)
    if match[1]:
        config.sample.steps = int(match[1])
    else:
        config.sample.times = tuple(1 - (int(match[3]) + i) / int(match[4]) for i in range(2))
    noise, y = images(fixture, "in/sample/noise"), fixture.get("in/sample/y")
    if match[2]:
        y = (np.arange(len(y)) + int(match[2]) * len(y)) % config.model.num_classes
    for name, f, net in built:
        got = f.sample(net, noise, y, config.sample)
        measure.compare(name, "samples", got, images(fixture, f"out/sample/{case}"), BOUND)


def times(fixture, case: str, measure: Measure) -> None:
    """t, r, t_min, t_max and fm_mask for many rows; omega_betaP: scales from the density of power P."""
    config, built = nets(fixture)
    power = re.fullmatch(r"omega_beta([\d.]+)", case)
    config.method.update(
        method_of(fixture, {"cfg_beta": float(power[1]) if power else 1.0, "norm_p": 1, "norm_eps": 1})
    )
    n_t, n_r, omega, t_min, t_max = (
        fixture.get(f"in/time/{key}") for key in ("n_t", "n_r", "u_omega", "u_tmin", "u_tmax")
    )
    draws = {"times": np.stack([n_t, n_r], axis=1), "omega": omega, "t_min": t_min, "t_max": t_max}
    draws |= {"coin": n_t, "drop": n_t}
    for name, f, net in built:
        t, r = f.sample_times(net, draws, config.method)
        got = {"t": t, "r": r, "fm_mask": (r == t).astype(int)} | f.sample_guidance(net, draws, config.method)
        key = "omega" if power else case
        if key not in got:
            raise UserError(f"the time case {case} is none of {', '.join(got)} and omega_betaP")
        measure.compare(name, case, got[key], fixture.get(f"out/time/{case}"), BOUND)


def initial(fixture, measure: Measure) -> None:
    """Statistics of freshly initialised networks."""
    want = {
        canonical_name(name, "improved") if is_flax(fixture) else name.removeprefix("net."): statistics
        for name, statistics in fixture.under("init/").items()
    }
    network.compare_initial(measure, config_of(fixture), want)


RUNNERS = {
    "rope_real": rotary(0), "rope_imag": rotary(1), "fwd": forward, "jvp": jvp, "loss": loss, "sample": sample,
    "time": times, "init": initial,
}  # fmt: skip
