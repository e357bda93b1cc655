"""Our own cases in float64: the two implementations against each other, and each against a second derivation."""

import functools

import numpy as np

from meanflow.commands import time_embedding as fitting
from meanflow.config import options as base
from meanflow.config import store
from meanflow.sampling import noise
from parity import oracle
from parity.adapters.frameworks import FRAMEWORKS
from parity.checks import Case, Measure

BOUND = 1e-10  # relative: both sum the same terms in another order, which costs a few units of 1e-16
# The central difference over 2h has a truncation error of h^2/6 times the third derivative and a rounding error of
# 1e-16/h, both relative to values of order 1: 1e-10 or so at h = 1e-5, and a few orders of margin for the derivative.
DIFFERENCE_BOUND, DIFFERENCE_STEP = 1e-7, 1e-5
BATCH_SIZE, STEPS, PART = 12, 10, 4  # PART: rows of a micro-batch
COMMON = {"input_size": 8, "channels": 3, "num_classes": 7, "compute_dtype": "float64"}
UNET = COMMON | {
    "name": "unet", "width": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,), "dropout": 0.3,
    "augment_dim": 6,
}  # fmt: skip
IMF = COMMON | {
    "name": "imf_dit", "patch_size": 2, "depth": 3, "head_depth": 1, "width": 32, "num_heads": 4, "mlp_ratio": 8 / 3,
    "num_class_tokens": 3, "num_omega_tokens": 2, "num_interval_tokens": 1, "num_time_tokens": 2,
}  # fmt: skip
TRANSFORMER = COMMON | {"patch_size": 2, "depth": 2, "width": 32, "num_heads": 4, "mlp_ratio": 3.0}
DMF = TRANSFORMER | {"name": "dmf_dit", "depth": 3, "dmf_depth": 2}
EDM2 = COMMON | {
    "name": "edm2", "width": 8, "channel_mult": (1, 2), "channel_mult_emb": 2, "channel_mult_noise": 1, "num_blocks": 1,
    "attn_resolutions": (4,), "head_width": 8, "sigma_data": 0.7,
}  # fmt: skip
# The frozen flow model that distills its guidance, of other sizes than the network that it teaches.
TEACHER = TRANSFORMER | {"interval_embedder": False, "depth": 1, "width": 16, "num_heads": 2}
# Tiny networks, by the name that their cases carry; the transformer's cases carry none.
NETWORKS = {
    "dit": TRANSFORMER,
    "unet": UNET,
    "unet_separate": UNET | {
        "time_embedding": "separate", "qkv_layout": "interleaved", "resample_filter": (1, 1), "channel_mult_noise": 1,
        "augment_dim": 0,
    },
    "unet_residual": UNET | {"embedding_type": "fourier", "encoder_type": "residual", "decoder_type": "skip"},
    "unet_skip": UNET | {"encoder_type": "skip", "decoder_type": "skip", "channel_mult": (1, 1, 2)},
    "imf": IMF,
    "dmf": DMF,
    "dmf_qk": DMF | {"qk_norm": True, "dmf_depth": 1},
    "dmf_sit": TRANSFORMER | {
        "interval_embedder": False, "depth": 3, "repa_dims": (12, 8), "repa_depth": 2, "projector_dim": 20
    },
    "edm2": EDM2,
    "edm2_flow": EDM2 | {
        "interval_embedder": False, "channel_mult": (2, 1, 1), "attn_resolutions": (8, 2), "head_width": 4,
        "logvar_channels": 6,
    },
}  # fmt: skip
GUIDED = {"omega": 0.6, "kappa": 0.5, "guidance_start": 0.3, "guidance_end": 0.7}
OMEGA = {"omega": 2.5, "kappa": 0.0, "guidance_start": 0.2, "guidance_end": 0.8}
SQUARED = {"weighting": "adaptive_squared", "adaptive_eps": 1e-3}
# Settings of config.method, each compared in every quantity; unnamed options keep their default.
SETTINGS = {
    "split/kappa0": OMEGA,
    "split/kappa": GUIDED | {"adaptive_power": 0.75},
    "split/noguid": {"guidance": False, "time_sampler": "uniform"},
    "split/cosine": GUIDED | {"path": "cosine", "weighting": "uniform", "label_drop_prob": 0.5},
    "split/squared": OMEGA | SQUARED | {"adaptive_power": 0.5, "time_mean": (0.3, -0.2), "time_std": (1.5, 1.2)},
    "split/front_drop": GUIDED | {"label_drop": "front", "label_drop_prob": 0.4, "clip_interval": False},
    "split/all_flow": GUIDED | {"flow_fraction": 1.0},
    "split/no_flow": GUIDED | {"flow_fraction": 0.0, "path": "cosine"},
    "front/kappa0": OMEGA | {"flow_rows": "front", "flow_fraction": 0.5, "path": "cosine"},
    "front/kappa": GUIDED | {"flow_rows": "front", "label_drop": "front", "label_drop_prob": 0.3},
    "front/noguid": {"flow_rows": "front", "guidance": False, "clip_interval": False, "weighting": "uniform"},
    "coin/kappa0": OMEGA | SQUARED | {"flow_rows": "coin", "flow_fraction": 0.3, "time_sampler": "uniform"},
    "coin/kappa": GUIDED | {"flow_rows": "coin", "flow_fraction": 0.25, "label_drop_prob": 0.3},
    "coin/noguid": SQUARED | {"flow_rows": "coin", "guidance": False, "adaptive_power": 0.75, "path": "cosine"},
}
V0 = {
    "guidance": False, "flow_fraction": 0.25, "time_mean": (-2.0, -2.0), "time_std": (2.0, 2.0),
    "adaptive_power": 0.75, "adaptive_eps": 1e-3, "clip_interval": False,
}  # fmt: skip
V1 = V0 | {"time_order": "truncated", "time_mean": (-0.6, -4.0), "time_std": (1.6, 1.6)}
DMF_TIMES = {"time_mean": (0.4, -1.2), "time_std": (1.0, 0.9)}
RE2 = {"name": "rectified", "time_sampler": "re2_truncate", "adaptive_power": 0.5}
DRAWN_SCALES = {"omega_sampler": "uniform", "omega_max": 3.5}
MODEL_GUIDANCE = {"omega": 0.6, "guidance_start": 0.1, "guidance_end": 0.7}
# The same for other networks, by network and name.  A U-Net has no classes, but the objective must not know that.
NETWORK_SETTINGS = {
    "unet/v0": V0,
    "unet/v1": V1 | {"time_mean": (-0.6, -0.9)},
    "unet/v1_coin": V1 | {"flow_rows": "coin", "flow_fraction": 0.5, "weighting": "uniform"},
    "unet/kappa": GUIDED | {"flow_fraction": 0.25},
    "unet_separate/cosine": V0 | {"path": "cosine", "time_sampler": "uniform", "flow_fraction": 0.5},
    "imf/split": {"flow_fraction": 0.5},
    "imf/power": {"flow_fraction": 0.5, "omega_power": 2.0, "omega_max": 5.0, "adaptive_power": 0.75},
    "imf/uniform": {"flow_fraction": 0.25, "weighting": "uniform", "omega_power": 0.5, "label_drop_prob": 0.5},
    "imf/noguid": {"flow_fraction": 0.5, "guidance": False, "path": "cosine", "time_sampler": "uniform"},
    "imf/front": {"flow_fraction": 0.5, "flow_rows": "front", "label_drop": "front", "label_drop_prob": 0.4},
    "imf/coin": {"flow_fraction": 0.5, "flow_rows": "coin", "adaptive_eps": 1e-3, "adaptive_power": 0.5},
    "imf/all_flow": {"flow_fraction": 1.0},
    "imf/no_flow": {"flow_fraction": 0.0, "weighting": "uniform"},
    "dmf/mg": DMF_TIMES | MODEL_GUIDANCE | {"label_drop_prob": 0.3},
    "dmf/default": {"guidance_type": "default", "path": "cosine", "time_sampler": "arctan", "adaptive_eps": 0.1},
    "dmf/distill": DMF_TIMES | MODEL_GUIDANCE | {"guidance_type": "distill", "teacher": "TEACHER", "omega": 1.5},
    "dmf/uniform": MODEL_GUIDANCE | {"time_sampler": "uniform", "label_drop": "front", "time_order": "truncated"},
    "dmf/all_pairs": DMF_TIMES | MODEL_GUIDANCE | {"log_variance_pairs": "all", "flow_time_std": 0.7},
    "dmf/official_times": DMF_TIMES | {"time_sampler": "arctan_official", "path": "cosine", "flow_time_mean": 0.5},
    "dmf_qk/mg": DMF_TIMES | MODEL_GUIDANCE,
    "dmf_sit/repa": {"label_drop_prob": 0.3},
    "dmf_sit/cosine": {"path": "cosine", "time_sampler": "arctan", "flow_time_mean": -0.3, "repa_coeff": 2.0},
    "dmf_sit/uniform": {"time_sampler": "uniform", "label_drop": "front", "label_drop_prob": 0.4},
    "edm2/re2": RE2 | DRAWN_SCALES,
    "edm2/clip": RE2 | DRAWN_SCALES | {"distance_clip": 2.0, "label_drop_prob": 0.4},
    "edm2_flow/flow": {"label_drop_prob": 0.3, "flow_time_mean": -0.4},
    # Of the method rather than of its network, with a transformer that compiles sooner.
    "dit/remeanflow_clip": RE2 | DRAWN_SCALES | {"distance_clip": 2.1, "flow_fraction": 0.5},
    "dit/remeanflow_coin": RE2 | DRAWN_SCALES | {"flow_rows": "coin", "interval_mean": 0.3, "interval_std": 0.7},
    "dit/remeanflow_constant": RE2 | {"omega": 1.4, "kappa": 0.3, "flow_rows": "front", "adaptive_eps": 1e-3},
    "dit/remeanflow_noguid": RE2 | {"guidance": False, "label_drop": "front", "flow_fraction": 0.0},
    "dit/remeanflow_uniform": RE2 | DRAWN_SCALES | {"time_sampler": "uniform", "weighting": "adaptive_squared"},
    "dit/remeanflow_unweighted": RE2 | DRAWN_SCALES | {"weighting": "uniform", "omega_max": 2.0},
}
# Of these the batch is also computed in parts.
DIVIDED = (
    "split/kappa", "front/kappa", "coin/kappa", "imf/front", "dmf/uniform", "dmf_sit/repa", "dit/remeanflow_clip",
)  # fmt: skip
SAMPLERS = {
    "steps1": {"steps": 1},
    "steps2": {"steps": 2},
    "steps5": {"steps": 5},
    "times": {"times": (1.0, 0.8, 0.35, 0.0)},
    "steps1_cfg": {"steps": 1, "cfg_scale": 1.5},
    "steps3_cfg": {"steps": 3, "cfg_scale": 2.5},
}
# The same of decoupled MeanFlow and of flow models, guided in an interval, with noise drawn anew.
INSIDE = {"cfg_scale": 1.5, "interval": (0.2, 0.8)}
NETWORK_SAMPLERS = {
    "dmf/euler": {"steps": 4, "shift": 1.5} | INSIDE,
    "dmf/restart": {"steps": 3, "sampler": "restart", "path": "cosine"},
    "dmf/ctm": {"steps": 4, "sampler": "ctm", "gamma": 0.7, "shift": 2.0} | INSIDE,
    "dmf/ctm_cosine": {"times": (1.0, 0.7, 0.4, 0.0), "sampler": "ctm", "path": "cosine"},
    "dmf/ctm_official": {"steps": 3, "sampler": "ctm", "official": True, "path": "cosine"},
    "dmf_sit/euler": {"steps": 5, "shift": 1.5} | INSIDE,
    "dmf_sit/euler_official": {"steps": 5, "official": True} | INSIDE,
    "dmf_sit/heun": {"steps": 4} | INSIDE,
    "dmf_sit/sde": {"steps": 5, "sampler": "sde", "shift": 1.5} | INSIDE,
    "dmf_sit/sde_elbo": {"times": (0.95, 0.6, 0.2, 0.0), "sampler": "sde", "diffusion": "elbo", "path": "cosine"},
}
NETWORK_SAMPLERS |= {
    "dmf/velocity": {"steps": 4, "sampler": "velocity", "shift": 1.5} | INSIDE,
    "edm2/steps1": {"steps": 1},
    "edm2/velocity": {"times": (80 / 81, 0.6, 0.2, 1e-8), "sampler": "velocity"},
    "edm2_flow/heun": {"steps": 4, "sampler": "heun"} | INSIDE,
}
# Couplings: the scale of the guidance, and whether an autoguidance network gives it.
COUPLINGS = {"plain": (1.0, False), "guided": (1.7, False), "autoguided": (1.7, True)}
GUIDED_SAMPLES = {"omega": 3.5, "interval": (0.25, 0.75)}
TRAINING = {
    "adamw_cosine_clip": {
        "optimizer": "adamw", "weight_decay": 0.1, "learning_rate": 3e-3, "beta2": 0.999, "schedule": "cosine",
        "warmup_steps": 3, "warmup_from": 1e-4, "steps": 9, "clip_norm": 1.0, "ema_decays": (0.9, 0.99),
    },
    "adam_constant": {"learning_rate": 1e-3, "beta1": 0.8, "adam_eps": 1e-6, "ema_decays": (0.95, 0.5)},
}  # fmt: skip


def all_cases() -> list[Case]:
    """Return the cases in float64."""
    cases = []
    for network in NETWORKS:
        prefix = "float64/" if network == "dit" else f"float64/{network}/"
        for function in (forward, jvp, difference):
            cases.append(Case(prefix + function.__name__, functools.partial(function, network)))
    cases += [Case(f"float64/{name}", functools.partial(loss, "dit", setting)) for name, setting in SETTINGS.items()]
    for name, setting in NETWORK_SETTINGS.items():
        cases.append(Case(f"float64/{name}", functools.partial(loss, name.split("/")[0], setting)))
    for name in DIVIDED:
        network = name.split("/")[0] if name in NETWORK_SETTINGS else "dit"
        setting = (SETTINGS | NETWORK_SETTINGS)[name]
        cases.append(Case(f"float64/parts/{name}", functools.partial(parts, network, setting)))
    for name, options in TRAINING.items():
        cases.append(Case(f"float64/train/{name}", functools.partial(train, "dit", {"method": GUIDED}, options)))
    periodic = TRAINING["adam_constant"] | {"ema_every": 4}
    cases.append(Case("float64/unet/train/ema_every", functools.partial(train, "unet", {"method": V0}, periodic)))
    cases += [Case(f"float64/sample/{name}", functools.partial(sample, "dit", o)) for name, o in SAMPLERS.items()]
    cases.append(Case("float64/unet/sample/steps2", functools.partial(sample, "unet", SAMPLERS["steps2"])))
    improved = {"method": NETWORK_SETTINGS["imf/power"]}
    options = TRAINING["adam_constant"]
    cases.append(Case("float64/imf/train/adam", functools.partial(train, "imf", improved, options)))
    cases += [
        Case(f"float64/imf/sample/{name}", functools.partial(sample, "imf", SAMPLERS[name] | GUIDED_SAMPLES))
        for name in ("steps1", "steps2", "times")
    ]
    decoupled = {"method": NETWORK_SETTINGS["dmf/mg"]}
    cases.append(
        Case("float64/dmf/train/clip", functools.partial(train, "dmf", decoupled, TRAINING["adamw_cosine_clip"]))
    )
    for name, options in NETWORK_SAMPLERS.items():
        network, sampler = name.split("/")
        cases.append(Case(f"float64/{network}/sample/{sampler}", functools.partial(sample, network, options)))
    rectified = {"method": NETWORK_SETTINGS["edm2/re2"]}
    options = TRAINING["adamw_cosine_clip"]
    cases.append(Case("float64/edm2/train/clip", functools.partial(train, "edm2", rectified, options)))
    cases += [Case(f"float64/edm2_flow/couple/{name}", functools.partial(couple, *o)) for name, o in COUPLINGS.items()]
    cases.append(Case("float64/edm2/time_embedding", time_embedding))
    return cases


def forward(network: str, measure: Measure) -> None:
    """The network's output of every head, with r < t and with r = t, and without what it need not be given."""
    cfg = config(network)
    x, _, _, y, _ = jvp_inputs(cfg)
    t, r = times()
    cases = {"u": (r, given(cfg), "u"), "u at r = t": (t, given(cfg), "u")}
    cases |= {"u (nothing given)": (r, {}, "u")} if cfg.model.name == "unet" and given(cfg) else {}
    cases |= {"v": (t, given(cfg), "v")} if "v" in heads(cfg) else {}
    for quantity, (r_given, beside, head) in cases.items():
        u = {name: f.forward(net, x, t, r_given, y, beside, head) for name, f, net in nets(cfg)}
        measure.compare("jax-torch", quantity, u["jax"], u["torch"], BOUND)
    if "repa_dims" in cfg.model and cfg.model.repa_dims:
        got = {name: f.features(net, x, t, y) for name, f, net in nets(cfg)}
        for i, (ours, theirs) in enumerate(zip(got["jax"], got["torch"], strict=True)):
            measure.compare("jax-torch", f"features {i}", ours, theirs, BOUND)
    if cfg.model.name == "dmf_dit" or ("logvar_channels" in cfg.model and cfg.model.logvar_channels):
        got = {name: f.log_variance(net, t, r) for name, f, net in nets(cfg)}
        measure.compare("jax-torch", "log_variance", got["jax"], got["torch"], BOUND)


def jvp(network: str, measure: Measure) -> None:
    """The bare network's output and total derivative, from `average_velocity` and `total_derivative`."""
    cfg = config(network)
    for head in heads(cfg):
        result = {name: f.jvp(net, *jvp_inputs(cfg), given(cfg), head) for name, f, net in nets(cfg)}
        for i, quantity in enumerate((head, f"d{head}_dt")):
            measure.compare("jax-torch", quantity, result["jax"][i], result["torch"][i], BOUND)


def difference(network: str, measure: Measure) -> None:
    """The total derivative of each framework against its own central difference along (v, 1, 0)."""
    cfg = config(network)
    z, t, r, y, v = jvp_inputs(cfg)
    h = DIFFERENCE_STEP
    for name, f, net in nets(cfg):
        ahead, behind = (f.forward(net, z + step * v, t + step, r, y, given(cfg)) for step in (h, -h))
        _, du_dt = f.jvp(net, z, t, r, y, v, given(cfg))
        measure.compare(name, "du_dt (central difference)", du_dt, (ahead - behind) / (2 * h), DIFFERENCE_BOUND)


def loss(network: str, setting: dict, measure: Measure, inputs=None) -> None:
    """The loss with its quantities and gradients: against `loss_reference`, the oracle, and the other framework's.

    inputs: (config) -> rows and draws by name; None: those of `batch`.
    """
    cfg = config(network, method=setting)
    rows, draws = (inputs or batch)(cfg)
    result, formula = {}, oracle_of(cfg, rows, draws)
    for name, f, net in nets(cfg):
        net = net._replace(teacher=teacher(f, cfg))
        result[name] = f.loss(net, rows, draws, cfg.method)
        against_reference(measure, name, result[name], f.loss(net, rows, draws, cfg.method, function="loss_reference"))
        against_formula(measure, name, result[name], formula)
    (value, aux, grads), (torch_value, torch_aux, torch_grads) = result["jax"], result["torch"]
    measure.compare("jax-torch", "loss", value, torch_value, BOUND)
    measure.equal("jax-torch", "y", aux["y"], torch_aux["y"])
    for quantity in sorted(aux.keys() - {"y"}):
        measure.compare("jax-torch", quantity, aux[quantity], torch_aux[quantity], BOUND)
    measure.compare_worst("jax-torch", "grad", grads, torch_grads, BOUND)


def oracle_of(cfg, rows, draws) -> tuple:
    """Return the loss, its quantities by name and its gradients, from the oracle.

    It knows neither framework; the network that it is given is PyTorch's, which compiles nothing.
    """
    f = FRAMEWORKS["torch"]
    net = f.build(cfg, random_weights(cfg))
    functions = [functools.partial(function, net) for function in (f.forward, f.jvp, f.log_variance, f.features)]
    bare = oracle.Bare(*functions, teacher=functools.partial(f.forward, teacher(f, cfg)))
    named = rows | {"null": cfg.model.num_classes}
    plain = oracle.FORMULAS[cfg.method.name](bare, named, given(cfg), draws, cfg.method)
    grads = f.regression_gradients(net, plain.pop("regressions"))
    losses = plain["row_loss"] + plain.get("row_loss_v", 0)
    return plain.pop("loss", losses.mean()), plain, grads


def teacher(f, cfg):
    """Return the frozen flow model that the config asks for, or None."""
    given = "teacher" in cfg.method and cfg.method.teacher
    return f.build(teacher_config(), random_weights(teacher_config())) if given else None


def against_reference(measure, framework, result, reference):
    """Compare a loss with that of `loss_reference`, its worst quantity and gradient."""
    (value, aux, grads), (expected, expected_aux, expected_grads) = result, reference
    aux, expected_aux = (on_jvp_rows(quantities, expected_aux) for quantities in (aux, expected_aux))
    measure.compare(framework, "loss (reference)", value, expected, BOUND)
    measure.compare_worst(framework, "aux (reference)", aux, expected_aux, BOUND)
    measure.compare_worst(framework, "grad (reference)", grads, expected_grads, BOUND)


def against_formula(measure, framework, result, formula):
    """Compare a loss with that of the oracle, and each quantity that the oracle has."""
    (value, aux, grads), (expected, expected_aux, expected_grads) = result, formula
    aux, expected_aux = (on_jvp_rows(quantities, expected_aux) for quantities in (aux, expected_aux))
    measure.compare(framework, "loss (formula)", value, expected, BOUND)
    for quantity in sorted(expected_aux):
        measure.compare(framework, f"{quantity} (formula)", aux[quantity], expected_aux[quantity], BOUND)
    measure.compare_worst(framework, "grad (formula)", grads, expected_grads, BOUND)


def on_jvp_rows(quantities, expected):
    """Return quantities by name, with du/dt and its tangent v_c as 0 on the flow rows that are `expected`.

    On those of a static split a loss has no du/dt, and v_c is that of the label after the drop.
    """
    jvp_row = (expected["r"] < expected["t"])[:, None, None, None]
    return {name: a * jvp_row if name in ("du_dt", "v_c") else a for name, a in quantities.items()}


def parts(network: str, setting: dict, measure: Measure) -> None:
    """The loss of a batch and what becomes of each row, against those of its parts."""
    cfg = config(network, method=setting)
    rows, draws = batch(cfg)
    slices = [slice(i, i + PART) for i in range(0, BATCH_SIZE, PART)]
    for name, f, net in nets(cfg):
        value, aux, grads = f.loss(net, rows, draws, cfg.method)
        values, auxes, trees = zip(*(f.loss(net, rows, draws, cfg.method, part) for part in slices), strict=True)
        measure.compare(name, "loss (mean of parts)", np.mean(values), value, BOUND)
        for quantity, a in sorted(aux.items()):
            found = [part[quantity] for part in auxes]
            found = np.concatenate(found) if a.ndim else np.mean(found)
            measure.compare(name, f"{quantity} (of parts)", found, a, BOUND)
        means = {key: np.mean([tree[key] for tree in trees], axis=0) for key in grads}
        measure.compare_worst(name, "grad (mean of parts)", means, grads, BOUND)


def train(network: str, setting: dict, options: dict, measure: Measure) -> None:
    """Parameters and EMAs after ten steps of the trainers' own update, on each framework's own gradients."""
    cfg = config(network, train=options, **setting)
    batches = [batch(cfg, seed) for seed in range(STEPS)]
    result = {name: f.train(net, cfg, batches) for name, f, net in nets(cfg)}
    (trees, scalars), (torch_trees, torch_scalars) = result["jax"], result["torch"]
    for quantity in trees:
        measure.compare_worst("jax-torch", quantity, trees[quantity], torch_trees[quantity], BOUND)
    for quantity in scalars:
        measure.compare("jax-torch", quantity, scalars[quantity], torch_scalars[quantity], BOUND)


def sample(network: str, options: dict, measure: Measure) -> None:
    """Generated images."""
    cfg = config(network, sample=options)
    rows, draws = batch(cfg)
    start, num_fresh = (rows | draws)["noise"], noise.num_fresh(cfg.sample)
    fresh = np.random.RandomState(3).normal(size=(num_fresh, *start.shape)) if num_fresh else None
    inputs = start, rows["label"], cfg.sample, fresh
    images = {name: f.sample(net, *inputs) for name, f, net in nets(cfg)}
    measure.compare("jax-torch", "samples", images["jax"], images["torch"], BOUND)


def couple(guidance: float, with_guide: bool, measure: Measure) -> None:
    """Couplings of a flow model of EDM2, guided by itself or by another."""
    cfg = config("edm2_flow")
    (rows, draws), images = batch(cfg), {}
    for name, f, net in nets(cfg):
        guide = (f.build(teacher_config(), random_weights(teacher_config())),) if with_guide else ()
        images[name] = f.couple(net, draws["noise"], rows["label"], {"steps": 4}, guidance, *guide)
    measure.compare("jax-torch", "samples", images["jax"], images["torch"], BOUND)


def time_embedding(measure: Measure) -> None:
    """Errors of two time embeddings to the one of their teacher: copies of it, and fitted ones."""
    student, teacher = config("edm2"), config("edm2_flow", model=EDM2 | {"interval_embedder": False})
    t, r = np.sort(np.random.RandomState(4).uniform(0.01, 0.98, size=(2, 50)), axis=0)[::-1].copy()
    errors = {}
    for name, f, of_teacher in nets(teacher):
        given = f.canonical(of_teacher)
        both = fitting.copied(given), fitting.fit(given, t, r)
        errors[name] = np.array([f.embedding_error(student, weights, teacher, given, t, r) for weights in both])
        measure.add(name, "fitted / copied", errors[name][1] / errors[name][0], bound=1.0)
    measure.compare("jax-torch", "error", errors["jax"], errors["torch"], BOUND)


def config(network: str = "dit", **changes: dict) -> base.Config:
    """Return the config of a tiny network; changes: options of a section by its name, e.g. method={'kappa': 0}."""
    model = NETWORKS[network]
    cfg = base.get_config(model.get("name", "dit"), changes.get("method", {}).get("name") or method_of(model))
    cfg.model.update(model)
    for section, options in changes.items():
        cfg[section].update(options)
    return cfg


def method_of(model: dict) -> str:
    """Return the name of the method that trains a network of `NETWORKS` unless its settings name another."""
    if not model.get("interval_embedder", True):
        return "flow"
    return {"imf_dit": "improved", "dmf_dit": "decoupled", "edm2": "rectified"}.get(model.get("name", ""), "meanflow")


def teacher_config() -> base.Config:
    """Return the config of the frozen flow model."""
    cfg = base.get_config("dit", "flow")
    cfg.model.update(TEACHER)
    return cfg


def nets(cfg) -> list[tuple]:
    """Return (name, framework, network) for each framework, with the same random weights."""
    return [(name, f, f.build(cfg, random_weights(cfg))) for name, f in FRAMEWORKS.items()]


def heads(cfg) -> str:
    """Return the letters of the velocities that the network of the config predicts."""
    return "uv" if cfg.model.name == "imf_dit" else "u"


def random_weights(cfg) -> dict[str, np.ndarray]:
    """Return canonical weights that are non-zero everywhere: zero layers would hide all but themselves."""
    alone = base.get_config(cfg.model.name, cfg.method.name)
    alone.model.update(cfg.model, compute_dtype="float64")
    return _random_weights(store.to_json(alone))


@functools.cache
def _random_weights(text: str) -> dict[str, np.ndarray]:
    cfg = store.from_json(text)
    rng = np.random.RandomState(1)
    torch = FRAMEWORKS["torch"]
    fresh = torch.fresh_weights(cfg, [0])[0]
    tables = torch.tables(torch.build(cfg, fresh))
    return {name: tables[name] if name in tables else rng.normal(0, 0.15, a.shape) for name, a in fresh.items()}


def batch(cfg, seed: int = 0) -> tuple[dict, dict]:
    """Return images, labels and what else a batch of the config holds, and the draws, by name, in float64."""
    rng = np.random.RandomState(100 + seed)
    c = cfg.model
    shape = (BATCH_SIZE, c.input_size, c.input_size, c.channels)
    x, y, noise = rng.normal(size=shape), rng.randint(0, c.num_classes, BATCH_SIZE), rng.normal(size=shape)
    uniform = cfg.method.time_sampler == "uniform"
    draws = {
        "noise": noise,
        "times": rng.uniform(size=(BATCH_SIZE, 2)) if uniform else rng.normal(size=(BATCH_SIZE, 2)),
        "coin": rng.uniform(size=BATCH_SIZE),
        "drop": rng.uniform(size=BATCH_SIZE),
    }
    if cfg.method.name == "rectified":
        rows = rows_of(cfg, x, y, rng) | {"noise": noise}
        uniform = {name: rng.uniform(size=BATCH_SIZE) for name in ("times", "second", "coin", "drop", "omega")}
        return rows, uniform | {"interval": rng.normal(size=BATCH_SIZE)}
    if cfg.method.name in ("flow", "decoupled"):
        return rows_of(cfg, x, y, rng), flow_draws(cfg, draws, rng)
    own = ("omega", "t_min", "t_max") if cfg.method.name == "improved" else ("dropout",)
    # Exact in any precision, as the masks that follow from `dropout` must be.
    draws |= {name: rng.uniform(size=BATCH_SIZE).astype(np.float32).astype(np.float64) for name in own}
    return rows_of(cfg, x, y, rng), draws


def rows_of(cfg, x, y, rng) -> dict[str, np.ndarray]:
    """Return a batch of images and labels with what else a batch of the config holds."""
    c, rows = cfg.model, {"image": x, "label": y}
    if c.name == "unet" and c.augment_dim:
        rows["augment"] = rng.normal(size=(BATCH_SIZE, c.augment_dim))
    if "repa_dims" in c and c.repa_dims:
        rows["features"] = rng.normal(size=(BATCH_SIZE, (c.input_size // c.patch_size) ** 2, sum(c.repa_dims)))
    return rows


def flow_draws(cfg, draws, rng) -> dict[str, np.ndarray]:
    """Return the draws of the flow term, with those of the MeanFlow term if the method has one."""
    times_flow = rng.uniform(size=BATCH_SIZE) if cfg.method.time_sampler == "uniform" else rng.normal(size=BATCH_SIZE)
    if cfg.method.name == "flow":
        return {"noise": draws["noise"], "times": times_flow, "drop": draws["drop"]}
    both = {name: draws[name] for name in ("noise", "times", "drop")}
    return both | {"times_flow": times_flow, "noise_flow": rng.normal(size=draws["noise"].shape)}


def given(cfg) -> dict[str, np.ndarray]:
    """Return what the network of the config is given in training beside (z, t, r, y), by name."""
    rows, draws = batch(cfg)
    if cfg.model.name == "imf_dit":
        return {"omega": 1 + 7 * draws["omega"], "t_min": draws["t_min"] / 2, "t_max": (1 + draws["t_max"]) / 2}
    beside = {name: a for name, a in rows.items() if name == "augment"}
    return beside | ({"dropout": draws["dropout"]} if cfg.model.name == "unet" and cfg.model.dropout else {})


def times() -> tuple[np.ndarray, np.ndarray]:
    """Return t and r < t [b]."""
    drawn = np.sort(np.random.RandomState(2).uniform(size=(BATCH_SIZE, 2)))
    return drawn[:, 1], drawn[:, 0]


def jvp_inputs(cfg) -> tuple:
    """Return z, t, r, y and a tangent of z."""
    rows, draws = batch(cfg)
    return rows["image"], *times(), rows["label"], (rows | draws)["noise"]
