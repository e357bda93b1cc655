"""Our own cases in float64: the two implementations against each other, and each against a second derivation."""

import functools

import ml_collections
import numpy as np

from configs import base
from parity import formula
from parity.checks import Case, Measure
from parity.frameworks import FRAMEWORKS

BOUND = 1e-10  # relative: both sum the same terms in another order, which costs a few units of 1e-16
# The central difference over 2h has a truncation error of h^2/6 times the third derivative and a rounding error of
# 1e-16/h, both relative to values of order 1: 1e-10 or so at h = 1e-5, and a few orders of margin for the derivative.
DIFFERENCE_BOUND, DIFFERENCE_STEP = 1e-7, 1e-5
BATCH_SIZE, STEPS = 12, 10
MODEL = {
    "input_size": 8, "channels": 3, "num_classes": 7, "patch_size": 2, "depth": 2, "width": 32, "num_heads": 4,
    "mlp_ratio": 3.0, "compute_dtype": "float64",
}  # fmt: skip
GUIDED = {"omega": 0.6, "kappa": 0.5, "guidance_start": 0.3, "guidance_end": 0.7}
OMEGA = {"omega": 2.5, "kappa": 0.0, "guidance_start": 0.2, "guidance_end": 0.8}
SQUARED = {"weighting": "adaptive_squared", "adaptive_eps": 1e-3}
# Settings of config.method, each compared in every quantity; unnamed options keep the default of configs/base.py.
SETTINGS = {
    "split/kappa0": OMEGA,
    "split/kappa": GUIDED | {"adaptive_power": 0.75},
    "split/noguid": {"guidance": False, "time_sampler": "uniform"},
    "split/cosine": GUIDED | {"path": "cosine", "weighting": "uniform", "label_drop_prob": 0.5},
    "split/squared": OMEGA | SQUARED | {"adaptive_power": 0.5, "time_mean": 0.3, "time_std": 1.5},
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
SAMPLERS = {
    "steps1": {"steps": 1},
    "steps2": {"steps": 2},
    "steps5": {"steps": 5},
    "times": {"times": (1.0, 0.8, 0.35, 0.0)},
    "steps1_cfg": {"steps": 1, "cfg_scale": 1.5},
    "steps3_cfg": {"steps": 3, "cfg_scale": 2.5},
}
TRAINING = {
    "adamw_cosine_clip": {
        "optimizer": "adamw", "weight_decay": 0.1, "learning_rate": 3e-3, "beta2": 0.999, "schedule": "cosine",
        "warmup_steps": 3, "warmup_from": 1e-4, "steps": 9, "clip_norm": 1.0, "ema_decays": (0.9, 0.99),
    },
    "adam_constant": {"learning_rate": 1e-3, "beta1": 0.8, "adam_eps": 1e-6, "ema_decays": (0.95, 0.5)},
}  # fmt: skip


def all_cases() -> list[Case]:
    """Return the cases in float64."""
    cases = [Case("float64/forward", forward), Case("float64/jvp", jvp), Case("float64/difference", difference)]
    cases += [Case(f"float64/{name}", functools.partial(loss, setting)) for name, setting in SETTINGS.items()]
    cases += [Case(f"float64/train/{name}", functools.partial(train, options)) for name, options in TRAINING.items()]
    cases += [Case(f"float64/sample/{name}", functools.partial(sample, options)) for name, options in SAMPLERS.items()]
    return cases


def forward(measure: Measure) -> None:
    """The network's output, with r < t and with r = t."""
    x, y, _ = batch()
    t, r = times()
    for quantity, r_given in (("u", r), ("u at r = t", t)):
        u = {name: f.forward(net, x, t, r_given, y) for name, f, net in nets(config())}
        measure.compare("jax-torch", quantity, u["jax"], u["torch"], BOUND)


def jvp(measure: Measure) -> None:
    """The bare network's output and total derivative, from the methods' `average_velocity`."""
    result = {name: f.jvp(net, *jvp_inputs()) for name, f, net in nets(config())}
    for i, quantity in enumerate(("u", "du_dt")):
        measure.compare("jax-torch", quantity, result["jax"][i], result["torch"][i], BOUND)


def difference(measure: Measure) -> None:
    """The total derivative of each framework against its own central difference along (v, 1, 0)."""
    z, t, r, y, v = jvp_inputs()
    h = DIFFERENCE_STEP
    for name, f, net in nets(config()):
        ahead, behind = (f.forward(net, z + step * v, t + step, r, y) for step in (h, -h))
        _, du_dt = f.jvp(net, z, t, r, y, v)
        measure.compare(name, "du_dt (central difference)", du_dt, (ahead - behind) / (2 * h), DIFFERENCE_BOUND)


def loss(setting: dict, measure: Measure) -> None:
    """Every quantity and gradient of the loss, between the frameworks and against the plain formula."""
    cfg = config(method=setting)
    x, y, draws = batch(cfg.method)
    result = {}
    for name, f, net in nets(cfg):
        result[name] = f.loss(net, x, y, draws, cfg.method)
        bare = functools.partial(f.forward, net), functools.partial(f.jvp, net)
        plain = formula.loss(*bare, (x, y, MODEL["num_classes"]), draws, cfg.method)
        inputs = tuple(plain[key] for key in ("z", "t", "r", "y"))
        plain_grads = f.regression_gradients(net, inputs, plain["target"], plain["scale"])
        against_formula(measure, name, result[name], plain, plain_grads)
    (value, aux, grads), (torch_value, torch_aux, torch_grads) = result["jax"], result["torch"]
    measure.compare("jax-torch", "loss", value, torch_value, BOUND)
    measure.equal("jax-torch", "y", aux["y"], torch_aux["y"])
    for quantity in sorted(aux.keys() - {"y"}):
        measure.compare("jax-torch", quantity, aux[quantity], torch_aux[quantity], BOUND)
    measure.compare_worst("jax-torch", "grad", grads, torch_grads, BOUND)


def against_formula(measure, framework, result, plain, plain_grads):
    """Compare a method's loss with the plain formula; du/dt only where r < t: a static split leaves it 0 elsewhere."""
    value, aux, grads = result
    jvp_row = (plain["r"] < plain["t"])[:, None, None, None]
    measure.compare(framework, "loss (formula)", value, plain["row_loss"].mean(), BOUND)
    measure.compare(framework, "du_dt (formula)", aux["du_dt"] * jvp_row, plain["du_dt"] * jvp_row, BOUND)
    for quantity in ("t", "r", "v_g", "u", "target", "err", "weight", "row_loss"):
        measure.compare(framework, f"{quantity} (formula)", aux[quantity], plain[quantity], BOUND)
    measure.compare_worst(framework, "grad (formula)", grads, plain_grads, BOUND)


def train(options: dict, measure: Measure) -> None:
    """Parameters and EMAs after ten steps of the trainers' own update, on each framework's own gradients."""
    cfg = config(method=GUIDED, train=options)
    batches = [batch(cfg.method, seed) for seed in range(STEPS)]
    result = {name: f.train(net, cfg, batches) for name, f, net in nets(cfg)}
    (trees, scalars), (torch_trees, torch_scalars) = result["jax"], result["torch"]
    for quantity in trees:
        measure.compare_worst("jax-torch", quantity, trees[quantity], torch_trees[quantity], BOUND)
    for quantity in scalars:
        measure.compare("jax-torch", quantity, scalars[quantity], torch_scalars[quantity], BOUND)


def sample(options: dict, measure: Measure) -> None:
    """Generated images."""
    cfg = config(sample=options)
    images = {name: f.sample(net, batch()[2][0], batch()[1], cfg.sample) for name, f, net in nets(cfg)}
    measure.compare("jax-torch", "samples", images["jax"], images["torch"], BOUND)


def config(**changes: dict) -> ml_collections.ConfigDict:
    """Return the config of a tiny network; changes: options of a section by its name, e.g. method={'kappa': 0}."""
    cfg = base.get_config()
    cfg.model.update(MODEL)
    for section, options in changes.items():
        cfg[section].update(options)
    return cfg


def nets(cfg) -> list[tuple]:
    """Return (name, framework, network) for each framework, with the same random weights."""
    return [(name, f, f.build(cfg, random_weights())) for name, f in FRAMEWORKS.items()]


@functools.cache
def random_weights() -> dict[str, np.ndarray]:
    """Return canonical weights that are non-zero everywhere: zero layers would hide all but themselves."""
    rng = np.random.RandomState(1)
    torch = FRAMEWORKS["torch"]
    fresh = torch.fresh_weights(config(), [0])[0]
    tables = torch.tables(torch.build(config(), fresh))
    return {name: tables[name] if name in tables else rng.normal(0, 0.15, a.shape) for name, a in fresh.items()}


def batch(cfg=None, seed: int = 0) -> tuple:
    """Return images, labels and draws (noise, times, coin, drop) in float64.  cfg: `config.method`."""
    rng = np.random.RandomState(100 + seed)
    shape = (BATCH_SIZE, MODEL["input_size"], MODEL["input_size"], MODEL["channels"])
    x, y, noise = rng.normal(size=shape), rng.randint(0, MODEL["num_classes"], BATCH_SIZE), rng.normal(size=shape)
    uniform = cfg is not None and cfg.time_sampler == "uniform"
    drawn = rng.uniform(size=(BATCH_SIZE, 2)) if uniform else rng.normal(size=(BATCH_SIZE, 2))
    return x, y, (noise, drawn, rng.uniform(size=BATCH_SIZE), rng.uniform(size=BATCH_SIZE))


def times() -> tuple[np.ndarray, np.ndarray]:
    """Return t and r < t [b]."""
    drawn = np.sort(np.random.RandomState(2).uniform(size=(BATCH_SIZE, 2)))
    return drawn[:, 1], drawn[:, 0]


def jvp_inputs() -> tuple:
    """Return z, t, r, y and a tangent of z."""
    x, y, draws = batch()
    return x, *times(), y, draws[0]
