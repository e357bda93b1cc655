"""Fixtures of Xinxi-Zhang/Re-MeanFlow and of the EDM2 networks it starts from.

remeanflow_edm2_torch: the two-time network, its loss, its samplers and the fit of its time embeddings; the weights also
include EDM2's own one-time embedder.  edm2_reflow_torch: EDM2's network, its autoguidance network, and couplings.
In our terms: flow rows and dropped labels by coin, errors averaged over each row, U-shaped times (re2_truncate).
"""

import functools
import re

import numpy as np

from meanflow.commands import time_embedding as fitting
from meanflow.config import options
from meanflow.errors import UserError
from parity.adapters.frameworks import FRAMEWORKS
from parity.checks import Measure
from parity.golden import network
from parity.golden.network import BOUND, nhwc

TWO_TIMES = ("unet.emb_noise_t.", "unet.emb_noise_r.")
ONE_TIME = "unet.emb_noise."
FIT_TIMES = 1 / 501, 80 / 81  # range in the fit of the time embeddings, from the fixture's README
# Official network arguments that ours fixes at their defaults.
CONSTANTS = {
    "res_balance": 0.3, "attn_balance": 0.3, "label_balance": 0.5, "concat_balance": 0.5, "clip_act": 256,
    "resample_filter": [1, 1],
}  # fmt: skip
OMEGA_MAX = 2.5  # from the published command; the fixture stores the scales themselves
# Values of the sampling cases that the fixture does not state.
CFG_TIME, CFG_SCALE = 0.3, 1.5
INTERMEDIATES = {
    "t": "t",
    "r": "r",
    "v_hat": "v_g",
    "u": "u",
    "dudt": "du_dt",
    "u_tgt": "target",
    "loss_vec": "row_loss",
}


def groups(fixture) -> list[str]:
    """Return the cases that the fixture must have."""
    if is_teacher(fixture):
        return ["fwd", "tsteps"]
    return ["fwd", "jvp", "init", "timeemb", "loss/train_mode", *(f"loss/{case}" for case in fixture.config["cases"])]


def is_teacher(fixture) -> bool:
    """Return whether the fixture is that of EDM2's own network."""
    return "cases" not in fixture.config


def config_of(net: dict, two_times: bool) -> options.Config:
    """Return our config for the official description `net` of a two-time or a one-time network."""
    config, mult = options.get_config("edm2", "rectified" if two_times else "flow"), net["channel_mult"]
    config.model.update(
        input_size=net["img_resolution"], channels=net["img_channels"], num_classes=net["label_dim"],
        width=net["model_channels"], channel_mult=tuple(mult), num_blocks=net["num_blocks"],
        channel_mult_emb=net.get("channel_mult_emb") or max(mult),
        channel_mult_noise=net.get("channel_mult_noise") or mult[0], attn_resolutions=tuple(net["attn_resolutions"]),
        head_width=net["channels_per_head"], logvar_channels=net["logvar_channels"], sigma_data=net["sigma_data"],
        compute_dtype="float32",
    )  # fmt: skip
    network.expect(net, dropout=0.0, **CONSTANTS)
    return config


def nets(fixture, two_times: bool, prefix: str = "param/", net: str = "net") -> tuple:
    """Return the config and the networks with the fixture's weights, less unused time embedders."""
    config = config_of(fixture.config[net], two_times)
    unused = (ONE_TIME,) if two_times else TWO_TIMES
    weights = {name: a for name, a in fixture.under(prefix).items() if not name.startswith(unused)}
    return config, network.nets(config, weights)


def images(fixture, group: str, *keys: str) -> list[np.ndarray]:
    """Return a group's inputs, images as [b h w c]."""
    return [nhwc(fixture.get(f"in/{group}/{key}")) for key in keys]


def nchw(a: np.ndarray) -> np.ndarray:
    """Return images [b h w c] as [b c h w]; leave other arrays unchanged."""
    return a.transpose(0, 3, 1, 2) if a.ndim == 4 else a


def forward(fixture, measure: Measure) -> None:
    """The networks' outputs, with and without preconditioning, and with weights normalised as in official training."""
    (teacher_forward if is_teacher(fixture) else student_forward)(fixture, measure)


def student_forward(fixture, measure: Measure) -> None:
    """u of the two-time network, with and without a label; the one-time network's velocity; Fourier features."""
    x, t, r, y = images(fixture, "fwd", "x", "t", "r", "y")
    null = np.full_like(y, fixture.config["net"]["label_dim"])
    for two_times in (True, False):
        for name, f, net in nets(fixture, two_times)[1]:
            got = {"v_og": f.forward(net, x, t, t, y), "F_og": f.raw(net, x, t, t, y)}
            if two_times:
                got = {"u": f.forward(net, x, t, r, y), "u_nolabel": f.forward(net, x, t, r, null)}
                got |= {"F": f.raw(net, x, t, r, y), "fourier_t": f.time_features(net, t)}
            for key, ours in got.items():
                measure.compare(name, key, ours, nhwc(fixture.get(f"out/fwd/{key}")), BOUND)


def teacher_forward(fixture, measure: Measure) -> None:
    """D of EDM2's network and of its guide, and with the weights that one training forward pass leaves behind."""
    x, sigma, y = images(fixture, "fwd", "x", "sigma", "y")
    null, t = np.full_like(y, fixture.config["num_classes"]), sigma / (1 + sigma)
    config, built = nets(fixture, False)
    for (name, f, net), (_, _, guide) in zip(built, guides(fixture), strict=True):
        projected = f.projected(net, config)
        got = {
            "D": f.denoise(net, x, sigma, y), "D_nolabel": f.denoise(net, x, sigma, null),
            "D_gnet": f.denoise(guide, x, sigma, y), "D_train": f.denoise(projected, x, sigma, y),
            "logvar": f.log_variance(net, t, t)[:, None, None, None],
            "out_conv_after_train": nhwc(f.canonical(projected)["unet.out_conv.weight"]),
        }  # fmt: skip
        for key, ours in got.items():
            measure.compare(name, key, ours, nhwc(fixture.get(f"out/fwd/{key}")), BOUND)


def guides(fixture) -> list[tuple]:
    """Return the autoguidance networks."""
    return nets(fixture, False, "param_gnet/", "gnet")[1]


def jvp(fixture, measure: Measure) -> None:
    """u and du/dt along (v_g, 1, 0), including a row at the largest time."""
    inputs = images(fixture, "jvp", "z", "t", "r", "y", "v_g")
    for name, f, net in nets(fixture, True)[1]:
        for key, got in zip(("u", "du_dt"), f.jvp(net, *inputs), strict=True):
            measure.compare(name, key, got, nhwc(fixture.get(f"out/jvp/{key}")), BOUND)


def loss(fixture, case: str, measure: Measure) -> None:
    """Every intermediate of the loss, and its gradients where the fixture has them; train_mode: normalised weights."""
    training = case == "train_mode"
    settings = fixture.config["cases"][fixture.config["gradcase"] if training else case]
    config, built = nets(fixture, True)
    draws, omega = loss_draws(fixture, settings)
    config.method.update(method_of(fixture, settings) | omega)
    x, noise, y = images(fixture, "loss", "x", "n", "y")
    want = fixture.under(f"out/loss/{case}/")
    # Every official forward pass normalises the weights in place: two passes for guidance, one for the loss.
    num_forwards = (3 if settings["w_pi"] > 1 else 1) if training else 0
    for name, f, net in built:
        for _ in range(num_forwards):
            net = f.projected(net, config)
        value, aux, grads = f.loss(net, {"image": x, "noise": noise, "label": y}, draws, config.method)
        got = {key: nchw(aux[ours]) for key, ours in INTERMEDIATES.items() if key in want}
        got |= {"loss": value, "sq_norm_error": aux["err"] / x[0].size}
        params = {f"param_after/{key}": a for key, a in (f.canonical(net) if training else {}).items()}
        got |= params | {f"grad/{key}": a for key, a in grads.items()}
        for key in want:
            if key.startswith(f"param_after/{ONE_TIME}"):  # unused, so unchanged
                measure.equal(name, key, fixture.get(f"param/{key.removeprefix('param_after/')}"), want[key])
                continue
            if key not in got:
                raise UserError(f"{key} of out/loss/{case} is not a result that this runner knows")
            ours = got[key][: len(want[key])] if key.startswith("param_after/") else got[key]  # some are truncated
            measure.compare(name, key, ours, want[key], BOUND)
        grad = fixture.under(f"grad/{case}/")
        if grad:
            network.compare_gradients(measure, name, grads, grad)


def loss_draws(fixture, settings: dict) -> tuple[dict, dict]:
    """Return the draws of the loss, and our options for its guidance scales w and w_pi.

    Scales that the trainer could draw, w = max(1, w_pi - 1), become draws; others become omega and kappa.
    """
    draws = time_draws(fixture, "loss", method_of(fixture, settings)["time_sampler"])
    draws["drop"] = fixture.get("in/loss/drop_u")
    w, w_pi = settings["w"], settings["w_pi"]
    if w_pi <= 1:
        return draws, {"guidance": False}
    if np.isclose(w, max(1, w_pi - 1)):
        draws["omega"] = np.full_like(draws["drop"], (w_pi - 1) / (OMEGA_MAX - 1))
        return draws, {"omega_sampler": "uniform", "omega_max": OMEGA_MAX}
    return draws, {"omega_sampler": "constant", "omega": float(w), "kappa": 1 - w / w_pi}


def time_draws(fixture, group: str, sampler: str) -> dict[str, np.ndarray]:
    """Return our draws of a group's times.  Raises UserError for a sampler that the official code lacks."""
    if sampler not in ("re2_truncate", "uniform"):
        raise UserError(f"the times {sampler} are neither re2_truncate nor uniform")
    coin = fixture.get(f"in/{group}/mask_u")
    if sampler == "uniform":
        first, second = images(fixture, group, "u1", "u2")
        return {"times": first, "second": second, "interval": np.zeros_like(first), "coin": coin}
    raw, perm, interval = images(fixture, group, "t_raw", "perm", "interval_n")
    times, second = u_shaped(raw, perm)
    return {"times": times, "second": second, "interval": interval, "coin": coin}


def u_shaped(raw: np.ndarray, perm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return our draws (times, second) for draws x of the exponential density and a permutation of [x, 1 - x]."""
    chosen = perm[: len(raw)]
    exponential = raw[chosen % len(raw)]
    return np.expm1(4 * exponential) / np.expm1(4), np.where(chosen < len(raw), 0.25, 0.75)


def method_of(fixture, settings: dict | None = None) -> dict:
    """Return our config.method options for the official ones; settings: those of a case."""
    c = fixture.config["mf"] | (settings or {})
    network.expect(c, loss_type="adaptive_loss_weight")
    return {
        "time_sampler": c.get("t_r_schedule", "re2_truncate"), "flow_rows": "coin",
        "flow_fraction": 1 - c["consistency_ratio"],
        "interval_mean": c["p_mean"], "interval_std": c["p_std"], "label_drop": "coin",
        "label_drop_prob": c["class_dropout"], "weighting": "adaptive", "adaptive_power": c["p"],
        "adaptive_eps": c["pc"],
    }  # fmt: skip


def times(fixture, case: str, measure: Measure) -> None:
    """t and r for many rows, and the mask of flow rows."""
    config, built = nets(fixture, True)
    config.method.update(method_of(fixture) | {"time_sampler": case})
    draws = time_draws(fixture, "time", case)
    want = fixture.under(f"out/time/{case}/")
    for name, f, net in built:
        t, r = f.sample_times(net, draws, config.method)
        got = {"t": t, "r": r, "mask": (t == r).astype(np.int32)}
        for key, official in want.items():
            measure.compare(name, key, got[key], official, BOUND)


def sample(fixture, case: str, measure: Measure) -> None:
    """Couplings heunN[_noguid]; samples one_step, edm[_og]_stepsN; forward_with_cfg."""
    (teacher_sample if is_teacher(fixture) else student_sample)(fixture, case, measure)


def teacher_sample(fixture, case: str, measure: Measure) -> None:
    """heunN: couplings of N steps, guided by the autoguidance network; _noguid: unguided."""
    match = re.fullmatch(r"heun(\d+)(_noguid)?", case)
    if match is None:
        raise UserError(f"the sampling case {case} is neither heunN nor heunN_noguid")
    noise, y = images(fixture, "sample", "noise", "y")
    for (name, f, net), (_, _, guide) in zip(nets(fixture, False)[1], guides(fixture), strict=True):
        guidance = () if match[2] else (fixture.config["guidance"], guide)
        got = f.couple(net, noise, y, grid(fixture, int(match[1])), *guidance)
        measure.compare(name, "samples", got, nhwc(fixture.get(f"out/sample/{case}")), BOUND)


def grid(fixture, steps: int) -> dict:
    """Return the options for the noise levels."""
    return {"steps": steps} | {key: fixture.config[key] for key in ("sigma_min", "sigma_max", "rho")}


def levels(fixture, measure: Measure) -> None:
    """The noise levels of couplings, heunN."""
    for case, want in fixture.under("out/tsteps/").items():
        for name, f in FRAMEWORKS.items():
            got = np.array(f.sigmas(grid(fixture, int(case.removeprefix("heun")))))
            measure.compare(name, case, got, want, BOUND)


def student_sample(fixture, case: str, measure: Measure) -> None:
    """one_step; edm_stepsN: by the velocity; edm_og_stepsN: by the one-time network's velocity; forward_with_cfg."""
    if case == "forward_with_cfg":
        guided_forward(fixture, measure)
        return
    match = re.fullmatch(r"one_step|edm(_og)?_steps(\d+)", case)
    if match is None:
        raise UserError(f"the sampling case {case} is neither one_step nor edm_stepsN nor edm_og_stepsN")
    config, built = nets(fixture, not match[1])
    noise, y = images(fixture, "sample", "noise", "y")
    if match[2]:
        times = np.linspace(fixture.config["max_sigma"], fixture.config["min_sigma"], int(match[2]) + 1)
        config.sample.update(times=tuple(times.tolist()), sampler="euler" if match[1] else "velocity")
    for name, f, net in built:
        got = f.sample(net, noise, y, config.sample)
        measure.compare(name, "samples", got, nhwc(fixture.get(f"out/sample/{case}")), BOUND)


def guided_forward(fixture, measure: Measure) -> None:
    """The negated guided velocity at a time counted from noise, as other projects' samplers expect it."""
    x, y = images(fixture, "fwd", "x", "y")
    t, null = np.full(len(y), 1 - CFG_TIME), np.full_like(y, fixture.config["null_class"])
    for name, f, net in nets(fixture, True)[1]:
        u, u_null = (f.forward(net, x, t, t, labels) for labels in (y, null))
        got = -(u_null + CFG_SCALE * (u - u_null))
        measure.compare(name, "v", got, nhwc(fixture.get("out/sample/forward_with_cfg")), BOUND)


def time_embedding(fixture, measure: Measure) -> None:
    """The official Adam fit of both time embeddings: its first and last loss; our fit must have a smaller error."""
    low, high = FIT_TIMES
    drawn = np.stack([np.clip(a, low, high) for a in images(fixture, "timeemb", "t", "r")], axis=1)
    times = np.stack([drawn.max(1), drawn.min(1)], axis=1).astype(np.float32)
    t, r = times.swapaxes(0, 1).reshape(2, -1)
    want = fixture.under("out/timeemb/")
    teacher_config, teachers = nets(fixture, False)
    config = fitting.two_times(teacher_config)
    for name, f, teacher in teachers:
        given, target = f.canonical(teacher), f.embed_times(teacher, *times[-1])
        measure.compare(name, "emb_target_last", target, want["emb_target_last"], BOUND)
        error = functools.partial(f.embedding_error, config, teacher_config=teacher_config, teacher=given)
        copied = fitting.copied(given)
        losses = error(copied, t=times[0, 0], r=times[0, 1]), np.square(want["emb_last"] - target).mean()
        measure.compare(name, "loss", losses, want["loss"][[0, -1]], BOUND)
        official = copied | dict(zip(fitting.TWO, (want["emb_noise_t"], want["emb_noise_r"]), strict=True))
        ours, theirs = (error(weights, t=t, r=r) for weights in (fitting.fit(given, t, r), official))
        measure.add(name, "error / official error", ours / theirs, bound=1.0)


def initial(fixture, measure: Measure) -> None:
    """Statistics of freshly initialised networks, two-time and one-time."""
    want = fixture.under("init/")
    for two_times in (True, False):
        unused = (ONE_TIME,) if two_times else TWO_TIMES
        own = {name: a for name, a in want.items() if not name.startswith(unused)}
        network.compare_initial(measure, config_of(fixture.config["net"], two_times), own)


RUNNERS = {
    "fwd": forward, "jvp": jvp, "loss": loss, "sample": sample, "time": times, "tsteps": levels,
    "timeemb": time_embedding, "init": initial,
}  # fmt: skip
