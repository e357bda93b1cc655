"""Fixtures of Gsunshine/meanflow (JAX): meanflow.py, models/models_dit.py.

In our terms: flow rows and dropped labels are the first rows of the batch, and t - r is clipped.
"""

import re

import numpy as np

from meanflow.errors import UserError
from meanflow.weights.names import canonical_name, flax_tree_to_canonical
from parity.adapters.frameworks import FRAMEWORKS
from parity.checks import Measure
from parity.golden import network
from parity.golden.network import BOUND

# Intermediates of the loss: official name -> ours.
INTERMEDIATES = {"t": "t", "r": "r", "v_g": "v_g", "u": "u", "du_dt": "du_dt", "u_tgt": "target"}


def groups(fixture) -> list[str]:
    """Return the cases that the fixture must have."""
    losses = [f"loss/{case}" for case in fixture.config["cases"]]
    samples = [f"sample/steps{num}" for num in fixture.config["sampling_timesteps"]]
    return ["pos_embed", "fwd", "jvp", "init", *losses, *samples]


def nets(fixture) -> tuple:
    """Return the config and the networks with the fixture's weights, converted, and the fixed tables."""
    config = network.config_of(fixture.config["net"])
    weights = flax_tree_to_canonical(fixture.under("param/"))
    return config, network.nets(config, with_tables(config, weights))


def with_tables(config, weights: dict) -> dict:
    """Return canonical weights with the fixed tables, which official Flax trees leave out."""
    torch = FRAMEWORKS["torch"]
    fresh = torch.fresh_weights(config, [0])[0]
    return weights | torch.tables(torch.build(config, fresh))


def position_table(fixture, measure: Measure) -> None:
    """The fixed table of positions."""
    for name, f, net in nets(fixture)[1]:
        measure.compare(name, "pos_embed", f.tables(net)["pos_embed"][0], fixture.get("out/pos_embed"), BOUND)


def forward(fixture, measure: Measure) -> None:
    """u(z, t, t - h, y), and the sinusoidal features of t."""
    x, t, h, y = (fixture.get(f"in/fwd/{key}") for key in ("x", "t", "h", "y"))
    features = fixture.get("out/fwd/t_freq")
    for name, f, net in nets(fixture)[1]:
        measure.compare(name, "u", f.forward(net, x, t, t - h, y), fixture.get("out/fwd/u"), BOUND)
        measure.compare(name, "t_freq", f.time_features(net, t), features, BOUND)


def jvp(fixture, measure: Measure) -> None:
    """u and du/dt along (v_g, 1, 0)."""
    inputs = [fixture.get(f"in/jvp/{key}") for key in ("z", "t", "r", "y", "v_g")]
    for name, f, net in nets(fixture)[1]:
        for key, got in zip(("u", "du_dt"), f.jvp(net, *inputs), strict=True):
            measure.compare(name, key, got, fixture.get(f"out/jvp/{key}"), BOUND)


def loss(fixture, case: str, measure: Measure) -> None:
    """Every intermediate of the loss, and its gradients where the fixture has them."""
    config, built = nets(fixture)
    config.method.update(method_of(fixture.config["base"] | fixture.config["cases"][case]))
    x, y, noise, drop = (fixture.get(f"in/loss/{key}") for key in ("x", "y", "e", "drop_u"))
    batch = {"image": x, "label": y}
    draws = {"noise": noise, "times": drawn(fixture, "loss", config.method), "coin": drop, "drop": drop}
    prefix = f"out/loss/{case}/"
    for name, f, net in built:
        value, aux, grads = f.loss(net, batch, draws, config.method)
        measure.equal(name, "y_inp", aux["y"], fixture.get(prefix + "y_inp"))
        for key, ours in INTERMEDIATES.items():
            measure.compare(name, key, aux[ours], fixture.get(prefix + key), BOUND)
        measure.compare(name, "adp_wt", 1 / aux["weight"], fixture.get(prefix + "adp_wt"), BOUND)
        v_loss = np.square(aux["u"] - aux["v"]).sum((1, 2, 3))
        measure.compare(name, "v_loss", v_loss, fixture.get(prefix + "v_loss"), BOUND)
        measure.compare(name, "loss", value, fixture.get(prefix + "loss"), BOUND)
        want = fixture.under(f"grad/{case}/")
        if want:
            network.compare_gradients(measure, name, grads, flax_tree_to_canonical(want))


def drawn(fixture, group: str, method) -> np.ndarray:
    """Return a group's draws of both times [b 2]: normals, or uniforms for the uniform sampler."""
    letter = "u" if method.time_sampler == "uniform" else "n"
    return np.stack([fixture.get(f"in/{group}/{letter}_{key}") for key in ("t", "r")], axis=1)


def method_of(settings: dict) -> dict:
    """Return our config.method options for the official ones, where a negative kappa means no guidance."""
    guidance = settings["guidance_eq"] == "cfg" and settings["kappa"] >= 0
    return {
        "path": "linear", "time_sampler": settings.get("noise_dist", "logit_normal"),
        "time_mean": (settings["P_mean"],) * 2, "time_std": (settings["P_std"],) * 2, "flow_rows": "front",
        "flow_fraction": settings["data_proportion"], "label_drop": "front",
        "label_drop_prob": settings["class_dropout_prob"], "guidance": guidance, "omega": settings["omega"],
        "kappa": settings["kappa"], "guidance_start": settings["t_start"], "guidance_end": settings["t_end"],
        "clip_interval": True, "weighting": "adaptive", "adaptive_power": settings["norm_p"],
        "adaptive_eps": settings["norm_eps"],
    }  # fmt: skip


def sample(fixture, case: str, measure: Measure) -> None:
    """stepsN: the times of config['sampling_timesteps'][N]; stepsN_classK: every label K."""
    match = re.fullmatch(r"steps(\d+)(?:_class(\d+))?", case)
    if match is None:
        raise UserError(f"the sampling case {case} is neither stepsN nor stepsN_classK")
    config, built = nets(fixture)
    config.sample.times = tuple(fixture.config["sampling_timesteps"][match[1]])
    noise, y = fixture.get("in/sample/noise"), fixture.get("in/sample/y")
    y = y if match[2] is None else np.full_like(y, int(match[2]))
    for name, f, net in built:
        want = fixture.get(f"out/sample/{case}")
        measure.compare(name, "samples", f.sample(net, noise, y, config.sample), want, BOUND)


def times(fixture, case: str, measure: Measure) -> None:
    """t and r for many rows; the case name ends in the percentage of flow rows, e.g. logit_normal_p75."""
    match = re.fullmatch(r"(logit_normal|uniform)_p(\d+)", case)
    if match is None:
        raise UserError(f"the time case {case} is not SAMPLER_pPERCENT, with SAMPLER logit_normal or uniform")
    config, built = nets(fixture)
    common = fixture.config["base"]
    config.method.update(time_sampler=match[1], time_mean=(common["P_mean"],) * 2, time_std=(common["P_std"],) * 2)
    config.method.update(flow_rows="front", flow_fraction=int(match[2]) / 100)
    times = drawn(fixture, "time", config.method)
    for name, f, net in built:
        got = f.sample_times(net, {"times": times, "coin": times[:, 0]}, config.method)
        for key, ours in zip(("t", "r"), got, strict=True):
            measure.compare(name, key, ours, fixture.get(f"out/time/{case}/{key}"), BOUND)


def initial(fixture, measure: Measure) -> None:
    """Statistics of freshly initialised networks."""
    config = network.config_of(fixture.config["net"])
    want = {canonical_name(name): statistics for name, statistics in fixture.under("init/").items()}
    network.compare_initial(measure, config, want)


RUNNERS = {
    "pos_embed": position_table, "fwd": forward, "jvp": jvp, "loss": loss, "sample": sample, "time": times,
    "init": initial,
}  # fmt: skip
