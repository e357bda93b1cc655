"""Fixtures of kyungmnlee/dmf: models/sit.py and dmft.py, loss.py, samplers.py.

In our terms: labels dropped by coin, every log-variance paired with every row's error, times without the exponential on
the cosine path, and samplers with their bugs.  Samplers keep float64 states around a float32 network.
"""

import copy
import re

import numpy as np

from meanflow.config import options
from meanflow.errors import UserError
from parity.checks import Measure
from parity.golden import network
from parity.golden.network import BOUND, nhwc

EPS = 0.01  # a constant of the official loss.py
DIFFUSION_TIMES = np.array([0.05, 0.3, 0.5, 0.9])  # of the fixture's results, from its README
# Settings of sampling cases that are stated only in the fixture's README.
GAMMA, GAMMA_GUIDED = 0.9, 0.5  # ctm's
SDE_COSINE = {"path": "cosine", "diffusion_scale": 0.5, "shift": 1.5}
# Intermediates of the loss: official name -> ours.
INTERMEDIATES = {
    "t_fm": "t_flow", "t_mf": "t", "r_mf": "r", "v_tgt_fm": "v_g_flow", "v_tgt_mf": "v_g", "v_fm": "u_flow", "u": "u",
    "du_dt": "du_dt", "u_tgt": "target", "lv_fm": "log_variance_flow", "lv_mf": "log_variance", "fm_loss": "err_flow",
    "mf_loss": "err", "fm_p_loss": "row_loss_flow", "mf_p_loss": "row_loss",
}  # fmt: skip


def groups(fixture) -> list[str]:
    """Return the cases that the fixture must have."""
    if is_flow(fixture):
        return ["fwd", "init", "loss/plain"]
    return ["fwd", "jvp", "init", "tsteps", *(f"loss/{case}" for case in fixture.config["g"])]


def is_flow(fixture) -> bool:
    """Return whether the fixture is the flow model's."""
    return "use_logvar" not in fixture.config["net"]


def config_of(net: dict) -> options.Config:
    """Return our config for the official network description `net`."""
    flow = "dmf_depth" not in net
    config = network.config_of(net, *("dit", "flow") if flow else ("dmf_dit", "decoupled"))
    config.model.qk_norm = net["qk_norm"]
    if flow:
        dims = tuple(net.get("z_dims", ()))
        config.model.update(repa_dims=dims, repa_depth=net["repa_depth"] or 1)
        config.model.update(projector_dim=net["projector_dim"] if dims else 1)
    else:
        config.model.dmf_depth = net["dmf_depth"]
        config.method.log_variance_pairs = "all"
    config.sample.official = True
    return config


def nets(fixture) -> tuple:
    """Return the config and the networks with the fixture's weights and, if it has one, its teacher."""
    config = config_of(fixture.config["net"])
    built = network.nets(config, fixture.under("param/"))
    if "teacher" in fixture.config:
        teachers = network.nets(config_of(fixture.config["teacher"]), fixture.under("param_teacher/"))
        built = [(name, f, net.replace(teacher=t[2])) for (name, f, net), t in zip(built, teachers, strict=True)]
    return config, built


def images(fixture, *keys: str) -> list[np.ndarray]:
    """Return arrays of the fixture, images as [b h w c]."""
    return [image(fixture, key) for key in keys]


def image(fixture, key: str) -> np.ndarray:
    """Return an array of the fixture; images as [b h w c]."""
    return nhwc(fixture.get(key))


def forward(fixture, measure: Measure) -> None:
    """u and its log-variance, or the flow model's v and projected tokens."""
    x, t, y = images(fixture, "in/fwd/x", "in/fwd/t", "in/fwd/y")
    for name, f, net in nets(fixture)[1]:
        if is_flow(fixture):
            measure.compare(name, "v", f.forward(net, x, t, t, y), image(fixture, "out/fwd/v"), BOUND)
            for i, got in enumerate(f.features(net, x, t, y)):
                measure.compare(name, f"z{i}", got, fixture.get(f"out/fwd/z{i}"), BOUND)
            continue
        r = fixture.get("in/fwd/r")
        measure.compare(name, "u", f.forward(net, x, t, r, y), image(fixture, "out/fwd/u"), BOUND)
        measure.compare(name, "logvar", f.log_variance(net, t, r), fixture.get("out/fwd/logvar").ravel(), BOUND)


def jvp(fixture, measure: Measure) -> None:
    """u and du/dt along (v_g, 1, 0)."""
    inputs = images(fixture, *(f"in/jvp/{key}" for key in ("z", "t", "r", "y", "v_g")))
    for name, f, net in nets(fixture)[1]:
        for key, got in zip(("u", "du_dt"), f.jvp(net, *inputs), strict=True):
            measure.compare(name, key, got, image(fixture, f"out/jvp/{key}"), BOUND)


def loss(fixture, case: str, measure: Measure) -> None:
    """Every intermediate of the loss, and its gradients where the fixture has them."""
    compare = flow_loss if is_flow(fixture) else decoupled_loss
    for name, grads in compare(fixture, case, measure):
        want = fixture.under(f"grad/{case}/")
        if want:
            network.compare_gradients(measure, name, grads, want)


def flow_loss(fixture, case: str, measure: Measure):
    """Compare a loss of the flow model; yield (framework, gradients)."""
    config, built = nets(fixture)
    c = fixture.config["loss"]
    config.method.update(path_of(case) | {"label_drop_prob": c["cfg_prob"], "repa_coeff": c["proj_coeff"]})
    config.method.update(flow_time_mean=c["P_mean"], flow_time_std=c["P_std"])
    x, y, noise = images(fixture, "in/loss/x", "in/loss/y", "in/loss/e")
    prefix = f"out/loss/{case}/"
    with_repa = f"{prefix}proj_loss" in fixture.arrays
    batch = {"image": x, "label": y} | ({"features": features(fixture)} if with_repa else {})
    draws = {"noise": noise, "times": fixture.get("in/loss/n_t"), "drop": fixture.get("in/loss/drop_u")}
    for name, f, net in built:
        value, aux, grads = f.loss(net, batch, draws, config.method)
        measure.equal(name, "y", aux["y"], fixture.get(prefix + "y"))
        for key, ours in {"t": "t", "v_t": "v", "v_fm": "u", "fm_loss": "err"}.items():
            measure.compare(name, key, aux[ours], image(fixture, prefix + key), BOUND)
        projection = aux.get("projection", np.zeros(()))
        if with_repa:
            measure.compare(name, "proj_loss", projection, fixture.get(prefix + "proj_loss"), BOUND)
        rows = aux["row_loss"] + c["proj_coeff"] * projection
        measure.compare(name, "loss_vec", rows, fixture.get(prefix + "loss_vec"), BOUND)
        measure.compare(name, "loss", value, fixture.get(prefix + "loss"), BOUND)
        yield name, grads


def decoupled_loss(fixture, case: str, measure: Measure):
    """Compare a loss of decoupled MeanFlow; yield (framework, gradients)."""
    config, built = nets(fixture)
    config.method.update(path_of(case) | method_of(fixture, "default" if case == "cosine" else case))
    x, y, noise, noise_flow = images(fixture, *(f"in/loss/{key}" for key in ("x", "y", "e_mf", "e_fm")))
    n_fm, n_t, n_r, drop = (fixture.get(f"in/loss/{key}") for key in ("n_fm", "n_t", "n_r", "drop_u"))
    draws = {
        "noise": noise, "noise_flow": noise_flow, "times": np.stack([n_t, n_r], axis=1), "times_flow": n_fm,
        "drop": drop,
    }  # fmt: skip
    batch, prefix = {"image": x, "label": y}, f"out/loss/{case}/"
    by_row = copy.deepcopy(config.method)
    by_row.log_variance_pairs = "row"
    for name, f, net in built:
        value, aux, grads = f.loss(net, batch, draws, config.method)
        if case != "cosine":
            measure.equal(name, "y", aux["y"], fixture.get(prefix + "y"))
            for key, ours in INTERMEDIATES.items():
                want = nhwc(fixture.get(prefix + key))
                want = want.reshape(aux[ours].shape) if key.startswith("lv") or "_p_" in key else want
                measure.compare(name, key, aux[ours], want, BOUND)
        matrix = fixture.get(prefix + "loss_matrix").reshape(aux["row_loss"].shape)
        measure.compare(name, "loss_matrix", (aux["row_loss"] + aux["row_loss_flow"]) / 2, matrix, BOUND)
        measure.compare(name, "loss", value, fixture.get(prefix + "loss"), BOUND)
        intended = f.loss(net, batch, draws, by_row)[0]
        measure.compare(name, "loss by row, the mean of the diagonal", intended, np.diagonal(matrix).mean(), BOUND)
        yield name, grads


def path_of(case: str) -> dict:
    """Return the path and time sampler of a case; all but the cosine case use the linear path."""
    if case.startswith("cosine"):
        return {"path": "cosine", "time_sampler": "arctan_official"}
    return {"path": "linear", "time_sampler": "logit_normal"}


def method_of(fixture, guidance: str) -> dict:
    """Return our config.method options for the official ones."""
    c, g = fixture.config["times"], fixture.config["g"][guidance]
    return {
        "guidance_type": g.get("g_type", guidance), "omega": g.get("omega", 0.0), "guidance_start": g.get("g_min", 0.0),
        "guidance_end": g.get("g_max", 1.0), "label_drop_prob": fixture.config["cfg_prob"],
        "flow_time_mean": c["P_mean"], "flow_time_std": c["P_std"], "time_mean": (c["P_mean_t"], c["P_mean_r"]),
        "time_std": (c["P_std_t"], c["P_std_r"]), "adaptive_eps": EPS,
    }  # fmt: skip


def features(fixture) -> np.ndarray:
    """Return the features of all encoders, concatenated [b n d]."""
    return np.concatenate([fixture.get(f"in/loss/zs{i}") for i in range(len(fixture.config["net"]["z_dims"]))], axis=-1)


def repa_loss(fixture, measure: Measure) -> None:
    """The projection loss of the stored projections."""
    num = len(fixture.config["net"]["z_dims"])
    projections = [fixture.get(f"out/fwd/z{i}") for i in range(num)]
    for name, f, _ in nets(fixture)[1]:
        measure.compare(
            name, "repa_loss", f.alignment(projections, features(fixture)), fixture.get("out/repa_loss"), BOUND
        )


def sample(fixture, case: str, measure: Measure) -> None:
    """SAMPLER_nN_sS, sde_nN; _cfg: guided inside the interval, _cfgall: everywhere, _nocfg: nowhere; _cosine: path."""
    match = re.fullmatch(r"(euler|heun|restart|ctm|sde)_n(\d+)(?:_s([\d.]+))?(?:_(cfg|cfgall|nocfg|cosine))?", case)
    if match is None:
        raise UserError(f"the sampling case {case} is not SAMPLER_nN_sS with _cfg, _cfgall, _nocfg or _cosine after it")
    config, built = nets(fixture)
    sampler, steps, shift, kind = match.groups()
    g, c = fixture.config["cfg"], config.sample
    c.update(sampler=sampler, steps=int(steps), shift=float(shift or 1))
    if sampler == "ctm":
        c.gamma = GAMMA_GUIDED if kind == "cfg" else GAMMA
    if kind == "cosine":
        c.update(SDE_COSINE if sampler == "sde" else {"path": "cosine"})
    elif kind in ("cfg", "cfgall"):
        scale = max(float(g["cfg_scale"]), 1.0)  # the official samplers guide only above 1
        c.update(cfg_scale=scale, interval=(g["g_min"], g["g_max"]) if kind == "cfg" else (0.0, 1.0))
    noise, y = images(fixture, "in/sample/noise", "in/sample/y")
    fresh = None
    if sampler in ("restart", "ctm", "sde") and int(steps) > 1:
        drawn = images(fixture, *(f"in/sample/extra{i}" for i in range(int(steps) - 1)))
        fresh = np.stack(drawn).astype(np.float32)
    for name, f, net in built:
        got = f.sample(net, noise, y, c, fresh)
        measure.compare(name, "samples", got, image(fixture, f"out/sample/{case}"), BOUND)


def times(fixture, case: str, measure: Measure) -> None:
    """Times of both terms for many rows; the case names the path."""
    config, built = nets(fixture)
    config.method.update(method_of(fixture, "default") | path_of(case))
    n_fm, n_t, n_r = (fixture.get(f"in/time/{key}") for key in ("n_fm", "n_t", "n_r"))
    for name, f, net in built:
        t, r = f.order_times(net, np.stack([n_t, n_r], axis=1), config.method)
        got = {"t_mf": t, "r_mf": r, "t_fm": f.flow_time(net, n_fm, config.method)}
        for key, ours in got.items():
            measure.compare(name, key, ours, fixture.get(f"out/time/{case}/{key}"), BOUND)


def steps(fixture, measure: Measure) -> None:
    """Sampling times, nN_sS: N steps, shifted by S."""
    config, built = nets(fixture)
    for case, want in fixture.under("out/tsteps/").items():
        match = re.fullmatch(r"n(\d+)_s([\d.]+)", case)
        if match is None:
            raise UserError(f"the case tsteps/{case} is not nN_sS")
        config.sample.update(steps=int(match[1]), shift=float(match[2]))
        for name, f, _ in built:
            measure.compare(name, case, np.array(f.sampling_times(config.sample)), want, BOUND)


def score(fixture, measure: Measure) -> None:
    """The score computed from a velocity, on each path."""
    v, x, t = images(fixture, "in/loss/x", "in/fwd/x", "in/score/t")
    for path, want in fixture.under("out/score/").items():
        for name, f, _ in nets(fixture)[1]:
            measure.compare(name, path, f.score(v, x, t, path), nhwc(want), BOUND)


def diffusion(fixture, measure: Measure) -> None:
    """The diffusion coefficient of the stochastic sampler, PATH_KIND."""
    config, built = nets(fixture)
    for case, want in fixture.under("out/diffusion/").items():
        path, kind = case.split("_")
        config.sample.update(path=path, diffusion=kind)
        for name, f, _ in built:
            measure.compare(name, case, f.diffusion(DIFFUSION_TIMES, config.sample), want, BOUND)


def initial(fixture, measure: Measure) -> None:
    """Statistics of freshly initialised networks."""
    network.compare_initial(measure, config_of(fixture.config["net"]), fixture.under("init/"))


RUNNERS = {
    "fwd": forward, "jvp": jvp, "loss": loss, "sample": sample, "time": times, "tsteps": steps, "score": score,
    "diffusion": diffusion, "repa_loss": repa_loss, "init": initial,
}  # fmt: skip
