"""Fixtures of the two U-Nets on CIFAR-10 pixels: Gsunshine/py-meanflow and zhuyu-cs/MeanFlow, branch cifar10.

In our terms: no classes and no guidance, flow rows by coin, t - r not clipped; dropout is off in all fixtures.
"""

import functools
import re

import numpy as np

from meanflow.config import options as base
from meanflow.errors import UserError
from parity.adapters.frameworks import FRAMEWORKS
from parity.checks import Measure
from parity.golden import network, optim
from parity.golden.network import BOUND, nhwc

# Options of the two variants that their fixtures do not state.
VARIANTS = {
    "meanflow_unet_torch": {"time_embedding": "joint", "qkv_layout": "split"},
    "sit_cifar_unet_torch": {"time_embedding": "separate", "qkv_layout": "interleaved"},
}
ADAPTIVE_EPS = 1e-3  # a constant of the reproduction's loss.py
EMA_EVERY = 16  # a constant of py-meanflow's models/meanflow.py
# Intermediates of the loss: official name -> ours.
INTERMEDIATES = {"t": "t", "r": "r", "u_pred": "u", "u": "u", "dudt": "du_dt", "u_tgt": "target", "u_target": "target"}


def groups(fixture) -> list[str]:
    """Return the cases that the fixture must have."""
    return ["fwd", "jvp", "init", *(f"loss/{case}" for case in loss_cases(fixture))]


def loss_cases(fixture) -> dict:
    """Return the settings of the loss cases."""
    return fixture.config["cases" if fixture.system == "meanflow_unet_torch" else "losses"]


def config_of(fixture):
    """Return our config for the fixture's network.  Raises UserError if its input and output channels differ."""
    net, config = fixture.config["net"], base.get_config("unet", "meanflow")
    network.expect(net, dropout=0.0, label_dim=0, label_dropout=0, s_embed=True)
    if fixture.system == "sit_cifar_unet_torch":
        network.expect(net, embedding_type="positional")  # its Fourier features have separate frequencies for each time
    if net["out_channels"] != net["in_channels"]:
        raise UserError(f"the official network maps {net['in_channels']} channels to {net['out_channels']}")
    config.model.update(
        input_size=net["img_resolution"], channels=net["in_channels"], width=net["model_channels"],
        channel_mult=tuple(net["channel_mult"]), channel_mult_emb=net["channel_mult_emb"],
        channel_mult_noise=net["channel_mult_noise"], num_blocks=net["num_blocks"],
        attn_resolutions=tuple(net["attn_resolutions"]), augment_dim=net.get("augment_dim", 0),
        embedding_type=net["embedding_type"], encoder_type=net["encoder_type"], decoder_type=net["decoder_type"],
        resample_filter=tuple(net["resample_filter"]), compute_dtype="float32", **VARIANTS[fixture.system],
    )  # fmt: skip
    config.method.update(guidance=False, label_drop_prob=0.0, flow_rows="coin", clip_interval=False)
    return config


def nets(fixture) -> tuple:
    """Return the config and the networks with the fixture's weights, whose names are already canonical."""
    config = config_of(fixture)
    return config, network.nets(config, fixture.under("param/"))


def labels(fixture, group: str) -> dict[str, np.ndarray]:
    """Return the augmentation labels of a group by our name, if it has them."""
    key = f"in/{group}/aug_cond"
    return {"augment": fixture.get(key)} if key in fixture.arrays else {}


def forward(fixture, measure: Measure) -> None:
    """u with and without augmentation labels, and the features of t before sines and cosines are swapped."""
    x, t = (nhwc(fixture.get(f"in/fwd/{key}")) for key in ("x", "t"))
    r = fixture.get("in/fwd/r") if "in/fwd/r" in fixture.arrays else t - fixture.get("in/fwd/h")
    cases = {"u": labels(fixture, "fwd")}
    cases |= {"u_noaug": {}} if cases["u"] else {}
    for name, f, net in nets(fixture)[1]:
        for key, given in cases.items():
            want = nhwc(fixture.get(f"out/fwd/{key}"))
            measure.compare(name, key, f.forward(net, x, t, r, np.zeros(len(t), int), given), want, BOUND)
        measure.compare(name, "map_noise_t", f.time_features(net, t), fixture.get("out/fwd/map_noise_t"), BOUND)


def jvp(fixture, measure: Measure) -> None:
    """u and du/dt along (v_g, 1, 0)."""
    z, t, r, v = (nhwc(fixture.get(f"in/jvp/{key}")) for key in ("z", "t", "r", "v_g"))
    for name, f, net in nets(fixture)[1]:
        got = f.jvp(net, z, t, r, np.zeros(len(t), int), v, labels(fixture, "jvp"))
        for key, ours in zip(("u", "du_dt"), got, strict=True):
            measure.compare(name, key, ours, nhwc(fixture.get(f"out/jvp/{key}")), BOUND)


def loss(fixture, case: str, measure: Measure) -> None:
    """Every intermediate of the loss, and its gradients where the fixture has them."""
    settings = loss_cases(fixture)[case]
    config, built = nets(fixture)
    config.method.update(method_of(settings))
    x, noise = (nhwc(fixture.get(f"in/loss/{key}")) for key in ("x", "e"))
    batch = {"image": x, "label": np.zeros(len(x), int)}
    batch |= labels(fixture, "loss") if settings.get("aug") else {}
    times, coin = drawn(fixture, "loss", config.method.time_sampler)
    draws = {"noise": noise, "times": times, "coin": coin, "drop": np.ones_like(coin)}
    prefix = f"out/loss/{case}/"
    want = {key: nhwc(a) for key, a in fixture.under(prefix).items()}
    for name, f, net in built:
        value, aux, grads = f.loss(net, batch, draws, config.method)
        got = {key: aux[ours] for key, ours in INTERMEDIATES.items() if key in want}
        got |= {"adp_wt": 1 / aux["weight"]} if "adp_wt" in want else {}
        got |= {"loss": aux["row_loss"], "loss_mean": value} if "loss_mean" in want else {"loss": value}
        for key in sorted(got.keys() | want.keys()):
            if key not in got or key not in want:
                raise UserError(f"{key} of {prefix} is not a result that this runner knows, or it is missing")
            measure.compare(name, key, got[key], want[key], BOUND)
        grad = fixture.under(f"grad/{case}/")
        if grad:
            network.compare_gradients(measure, name, grads, grad)


def drawn(fixture, group: str, sampler: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the draws of both times [b 2] and the coins [b] of flow rows."""
    if f"in/{group}/n_t" in fixture.arrays:
        times = np.stack([fixture.get(f"in/{group}/{key}") for key in ("n_t", "n_r")], axis=1)
        return times, fixture.get(f"in/{group}/mask_u")
    times = fixture.get(f"in/{group}/time_u" if sampler == "uniform" else f"in/{group}/time_n")
    return times, fixture.get(f"in/{group}/eq_u")


def method_of(settings: dict) -> dict:
    """Return our config.method options for the official ones of a loss case."""
    if "tr_sampler" in settings:
        power = {"adaptive_power": settings["norm_p"], "adaptive_eps": settings["norm_eps"]}
        return {"weighting": "adaptive"} | power | time_options(settings["tr_sampler"], settings)
    options = {
        "time_sampler": settings["time_sampler"], "flow_fraction": 1 - settings["ratio_r_not_equal_t"],
        "path": settings.get("path_type", "linear"),
        "weighting": "adaptive" if settings["weighting"] == "adaptive" else "uniform",
        "adaptive_power": settings["adaptive_p"], "adaptive_eps": ADAPTIVE_EPS,
    }  # fmt: skip
    if settings["time_sampler"] == "logit_normal":
        options |= {"time_mean": (settings["time_mu"],) * 2, "time_std": (settings["time_sigma"],) * 2}
    return options


def time_options(sampler: str, args: dict) -> dict:
    """Return our options for the time samplers v0 and v1 of py-meanflow."""
    if sampler not in ("v0", "v1"):
        raise UserError(f"{sampler} is not one of the time samplers v0 and v1")
    return {
        "time_order": "sorted" if sampler == "v0" else "truncated", "flow_fraction": 1 - args["ratio"],
        "time_mean": (args["P_mean_t"], args["P_mean_r"]), "time_std": (args["P_std_t"], args["P_std_r"]),
    }  # fmt: skip


def times(fixture, case: str, measure: Measure) -> None:
    """t and r for many rows; SAMPLER_default with the fixture's arguments, SAMPLER_alt with others."""
    match = re.fullmatch(r"(v\d)_(default|alt)", case)
    if match is None:
        raise UserError(f"the time case {case} is neither SAMPLER_default nor SAMPLER_alt")
    config, built = nets(fixture)
    config.method.update(time_options(match[1], fixture.config["args" if match[2] == "default" else "time_alt"]))
    times, coin = drawn(fixture, "time", "logit_normal")
    for name, f, net in built:
        got = f.sample_times(net, {"times": times, "coin": coin}, config.method)
        for key, ours in zip(("t", "r"), got, strict=True):
            measure.compare(name, key, ours, fixture.get(f"out/time/{case}/{key}"), BOUND)


def sample(fixture, case: str, measure: Measure) -> None:
    """stepsN: N uniform steps; stepsN_u8: the same in 8 bits, rounded down."""
    match = re.fullmatch(r"steps(\d+)(_u8)?", case)
    if match is None:
        raise UserError(f"the sampling case {case} is neither stepsN nor stepsN_u8")
    config, built = nets(fixture)
    config.sample.steps = int(match[1])
    noise, want = nhwc(fixture.get("in/sample/noise")), nhwc(fixture.get(f"out/sample/{case}"))
    for name, f, net in built:
        images = f.sample(net, noise, np.zeros(len(noise), int), config.sample)
        if match[2]:
            levels = np.clip(images / 2 + 0.5, 0, 1) * 255
            margin = BOUND * 127.5 * np.abs(images).max()  # this close to the boundary between levels, rounding decides
            nearest = np.clip(want, np.floor(levels - margin), np.floor(levels + margin))
            measure.equal(name, "8-bit samples", nearest, want)
        else:
            measure.compare(name, "samples", images, want, BOUND)


def learning_rates(fixture, case: str, measure: Measure) -> None:
    """lr/warmupN of the reproduction: (step + 1) / N of the rate, then the rate itself, read from lr/warmup0."""
    match = re.fullmatch(r"warmup(\d+)", case)
    if match is None:
        raise UserError(f"{case} is not a known learning-rate schedule")
    c, num_warmup = base.get_config().train, int(match[1])
    c.learning_rate = float(fixture.get("out/lr/warmup0")[0])
    if num_warmup:
        c.update(warmup_steps=num_warmup - 1, warmup_from=c.learning_rate / num_warmup)
    steps, want = fixture.get("in/lr/steps"), fixture.get(f"out/lr/{case}")
    for name, f in FRAMEWORKS.items():
        measure.compare(name, "learning_rate", f.learning_rates(steps, c), want, BOUND)


def initial(fixture, measure: Measure) -> None:
    """Statistics of freshly initialised networks."""
    network.compare_initial(measure, config_of(fixture), fixture.under("init/"))


RUNNERS = {
    "fwd": forward, "jvp": jvp, "loss": loss, "time": times, "sample": sample, "lr": learning_rates, "init": initial,
    "ema": functools.partial(optim.emas, every=EMA_EVERY),
}  # fmt: skip
