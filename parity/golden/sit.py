"""Fixtures of zhuyu-cs/MeanFlow (PyTorch): sit.py, loss.py, meanflow_sampler.py.

In our terms: flow rows and dropped labels by coin; `adaptive` squares the summed error once more; rows are guided where
the label is kept and the time is in [cfg_min_t, cfg_max_t].
"""

import re

import numpy as np

from meanflow.errors import UserError
from parity.checks import Measure
from parity.golden import network
from parity.golden.network import BOUND, nhwc

ADAPTIVE_EPS = 1e-3  # a constant of the official loss.py


def groups(fixture) -> list[str]:
    """Return the cases that the fixture must have."""
    return ["fwd", "jvp", "init", *(f"loss/{case}" for case in fixture.config["losses"])]


def nets(fixture) -> tuple:
    """Return the config and the networks with the fixture's weights, whose names are already canonical."""
    network.expect(fixture.config["net"], qk_norm=False)  # timm's is a LayerNorm
    config = network.config_of(fixture.config["net"])
    return config, network.nets(config, fixture.under("param/"))


def forward(fixture, measure: Measure) -> None:
    """u(z, t, r, y); without a label the official network takes class 0."""
    x, t, r, y = (nhwc(fixture.get(f"in/fwd/{key}")) for key in ("x", "t", "r", "y"))
    for name, f, net in nets(fixture)[1]:
        for key, labels in (("u", y), ("u_ynone", np.zeros_like(y))):
            measure.compare(name, key, f.forward(net, x, t, r, labels), nhwc(fixture.get(f"out/fwd/{key}")), BOUND)


def jvp(fixture, measure: Measure) -> None:
    """u and du/dt along (v_g, 1, 0)."""
    inputs = [nhwc(fixture.get(f"in/jvp/{key}")) for key in ("z", "t", "r", "y", "v_g")]
    for name, f, net in nets(fixture)[1]:
        for key, got in zip(("u", "du_dt"), f.jvp(net, *inputs), strict=True):
            measure.compare(name, key, got, nhwc(fixture.get(f"out/jvp/{key}")), BOUND)


def loss(fixture, case: str, measure: Measure) -> None:
    """Every intermediate of the loss, and its gradients where the fixture has them."""
    settings = fixture.config["losses"][case]
    config, built = nets(fixture)
    config.method.update(method_of(settings))
    x, y, noise = (nhwc(fixture.get(f"in/loss/{key}")) for key in ("x", "y", "e"))
    times = fixture.get("in/loss/time_u" if settings["time_sampler"] == "uniform" else "in/loss/time_n")
    # The official code draws no uniforms if labels are never dropped.
    drop = fixture.get("in/loss/drop_u") if settings["label_dropout_prob"] > 0 else np.ones(len(y), np.float32)
    batch = {"image": x, "label": y}
    draws = {"noise": noise, "times": times, "coin": fixture.get("in/loss/eq_u"), "drop": drop}
    for name, f, net in built:
        _, aux, grads = f.loss(net, batch, draws, config.method)
        guided = (
            (aux["y"] != net.num_classes) & (aux["t"] >= settings["cfg_min_t"]) & (aux["t"] <= settings["cfg_max_t"])
        )
        compare_loss(fixture, f"out/loss/{case}/", measure, name, aux, guided)
        z, _ = f.path(net, x, noise, aux["t"], config.method)
        measure.compare(name, "z_t", z, nhwc(fixture.get(f"out/loss/{case}/z_t")), BOUND)
        want = fixture.under(f"grad/{case}/")
        if want:
            network.compare_gradients(measure, name, grads, want)


def compare_loss(fixture, prefix, measure, name, aux, guided):
    """Compare the aux of one framework with the results under `prefix`; guided: [b] bool, which rows it guides."""
    want = {key: nhwc(fixture.get(prefix + key)) for key in ("t", "r", "y", "cfg_mask", "v_t", "u", "u_target", "loss")}
    measure.equal(name, "y", aux["y"], want["y"])
    measure.equal(name, "cfg_mask", guided, want["cfg_mask"])
    for key, ours in (("t", "t"), ("r", "r"), ("v_t", "v"), ("u", "u"), ("u_target", "target"), ("loss", "row_loss")):
        measure.compare(name, key, aux[ours], want[key], BOUND)
    mask = want["cfg_mask"].astype(bool)
    if mask.any():
        measure.compare(name, "cfg_v_tilde", aux["v_g"][mask], nhwc(fixture.get(prefix + "cfg_v_tilde")), BOUND)
    measure.compare(name, "v_g of unguided rows", aux["v_g"][~mask], want["v_t"][~mask], BOUND)
    measure.compare(name, "loss_mean", aux["row_loss"].mean(), fixture.get(prefix + "loss_mean"), BOUND)
    error = np.square(aux["u"] - aux["target"]).mean()
    measure.compare(name, "loss_mean_ref", error, fixture.get(prefix + "loss_mean_ref"), BOUND)


def method_of(settings: dict) -> dict:
    """Return our config.method options for the official ones."""
    weighting = "adaptive_squared" if settings["weighting"] == "adaptive" else "uniform"
    return {
        "path": settings["path_type"], "time_sampler": settings["time_sampler"],
        "time_mean": (settings["time_mu"],) * 2, "time_std": (settings["time_sigma"],) * 2,
        "flow_rows": "coin", "flow_fraction": 1 - settings["ratio_r_not_equal_t"],
        "label_drop": "coin", "label_drop_prob": settings["label_dropout_prob"], "guidance": True,
        "omega": settings["cfg_omega"], "kappa": settings["cfg_kappa"], "guidance_start": settings["cfg_min_t"],
        "guidance_end": settings["cfg_max_t"], "clip_interval": False,
        "weighting": weighting, "adaptive_power": settings["adaptive_p"], "adaptive_eps": ADAPTIVE_EPS,
    }  # fmt: skip


def sample(fixture, case: str, measure: Measure) -> None:
    """stepsN and stepsN_cfg: N uniform steps; guided only for a scale above 1, as in the official sampler."""
    match = re.fullmatch(r"steps(\d+)(_cfg)?", case)
    if match is None:
        raise UserError(f"the sampling case {case} is neither stepsN nor stepsN_cfg")
    config, built = nets(fixture)
    scale = float(fixture.config["cfg_scale"]) if match[2] else 1.0
    config.sample.update(steps=int(match[1]), cfg_scale=max(scale, 1.0))
    noise, y = nhwc(fixture.get("in/sample/noise")), fixture.get("in/sample/y")
    for name, f, net in built:
        want = nhwc(fixture.get(f"out/sample/{case}"))
        measure.compare(name, "samples", f.sample(net, noise, y, config.sample), want, BOUND)


def times(fixture, case: str, measure: Measure) -> None:
    """t and r for many rows."""
    t, r = (fixture.get(f"out/time/{case}/{key}") for key in ("t", "r"))
    config, built = nets(fixture)
    uniform = case.startswith("uniform")
    drawn = fixture.get("in/time/time_u" if uniform else "in/time/time_n")
    coin = fixture.get("in/time/eq_u")
    config.method.update(time_sampler="uniform" if uniform else "logit_normal", flow_rows="coin")
    config.method.update(time_settings(t, r, drawn, coin, uniform))
    for name, f, net in built:
        got = f.sample_times(net, {"times": drawn, "coin": coin}, config.method)
        for key, ours, want in zip(("t", "r"), got, (t, r), strict=True):
            measure.compare(name, key, ours, want, BOUND)


def time_settings(t, r, drawn, coin, uniform) -> dict:
    """Infer the settings of a time case from its results: neither its name nor the config states them.

    All rows must agree on the fraction of flow rows, and on mean and standard deviation rounded to three digits.
    """
    flow = t == r
    below, above = coin[flow].max(initial=0.0), coin[~flow].min(initial=1.0)
    settings = {"flow_fraction": float(below + above) / 2}
    if uniform:
        return settings
    logits = np.log(t.astype(np.float64)) - np.log1p(-t.astype(np.float64))
    std, mean = np.polyfit(drawn.max(1).astype(np.float64), logits, 1)
    return settings | {"time_mean": (round(float(mean), 3),) * 2, "time_std": (round(float(std), 3),) * 2}


def initial(fixture, measure: Measure) -> None:
    """Statistics of freshly initialised networks."""
    network.compare_initial(measure, network.config_of(fixture.config["net"]), fixture.under("init/"))


RUNNERS = {"fwd": forward, "jvp": jvp, "loss": loss, "sample": sample, "time": times, "init": initial}
