"""Our own cases in float64: the implementations against each other, `loss_reference` and the oracle."""

import functools

import numpy as np

from meanflow.commands import time_embedding as fitting
from meanflow.config import options as base
from meanflow.config import store
from meanflow.sampling import noise
from parity import oracle
from parity.adapters.frameworks import FRAMEWORKS
from parity.cases.settings import (
    COUPLINGS,
    DIVIDED,
    EDM2,
    NETWORK_SAMPLERS,
    NETWORK_SETTINGS,
    NETWORKS,
    SAMPLERS,
    SETTINGS,
    TEACHER,
    TRAINED,
)
from parity.checks import Case, Measure

BOUND = 1e-10  # relative: both sum the same terms, in another order, which costs a few times 1e-16
# A central difference over 2h has a truncation error of h^2/6 times the third derivative and a rounding error of
# 1e-16/h, both relative to values of order 1: about 1e-10 at h = 1e-5, plus a few orders of margin for the derivative.
DIFFERENCE_BOUND, DIFFERENCE_STEP = 1e-7, 1e-5
BATCH_SIZE, STEPS, PART = 12, 10, 4  # PART: rows of a micro-batch


def all_cases() -> list[Case]:
    """Return the cases in float64."""
    cases = []

    def add(name, function, network, *args):
        cases.append(Case(f"float64/{name}", functools.partial(function, network, *args), network))

    for network in NETWORKS:
        for function in (forward, jvp, difference):
            add(f"{'' if network == 'dit' else f'{network}/'}{function.__name__}", function, network)
    losses = {name: ("dit", setting) for name, setting in SETTINGS.items()}
    losses |= {name: (name.split("/")[0], setting) for name, setting in NETWORK_SETTINGS.items()}
    for name, arguments in losses.items():
        add(name, loss, *arguments)
    for name in DIVIDED:
        add(f"parts/{name}", parts, *losses[name])
    for name, (network, setting, options) in TRAINED.items():
        add(name, train, network, setting, options)
    for name, options in SAMPLERS.items():
        add(f"sample/{name}", sample, "dit", options)
    for name, options in NETWORK_SAMPLERS.items():
        network, sampler = name.split("/")
        add(f"{network}/sample/{sampler}", sample, network, options)
    for name, options in COUPLINGS.items():
        add(f"edm2_flow/couple/{name}", couple, "edm2_flow", *options)
    add("edm2/time_embedding", time_embedding, "edm2")
    return cases


def forward(network: str, measure: Measure) -> None:
    """The network's output from every head, with r < t and with r = t, and without its optional inputs."""
    cfg = config(network)
    x, _, _, y, _ = jvp_inputs(cfg)
    t, r = times()
    cases = {"u": (r, given(cfg), "u"), "u at r = t": (t, given(cfg), "u")}
    cases |= {"u (nothing given)": (r, {}, "u")} if cfg.model.name == "unet" and given(cfg) else {}
    cases |= {"v": (t, given(cfg), "v")} if "v" in heads(cfg) else {}
    for quantity, (end, optional, head) in cases.items():
        u = {name: f.forward(net, x, t, end, y, optional, head) for name, f, net in nets(cfg)}
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
        later, earlier = (f.forward(net, z + step * v, t + step, r, y, given(cfg)) for step in (h, -h))
        _, du_dt = f.jvp(net, z, t, r, y, v, given(cfg))
        measure.compare(name, "du_dt (central difference)", du_dt, (later - earlier) / (2 * h), DIFFERENCE_BOUND)


def loss(network: str, setting: dict, measure: Measure, inputs=None) -> None:
    """The loss with its quantities and gradients, against `loss_reference`, the oracle and the other framework.

    inputs: (config) -> rows and draws by name; by default those of `batch`.
    """
    cfg = config(network, method=setting)
    rows, draws = (inputs or batch)(cfg)
    result, formula = {}, oracle_of(cfg, rows, draws)
    for name, f, net in nets(cfg):
        net = net.replace(teacher=teacher(f, cfg))
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
    """Return the oracle's loss, quantities by name, and gradients.

    The oracle is independent of both frameworks; it is evaluated once, on PyTorch's network, which compiles nothing.
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
    """Return the frozen flow model if the config has a teacher, else None."""
    given = "teacher" in cfg.method and cfg.method.teacher
    return f.build(teacher_config(), random_weights(teacher_config())) if given else None


def against_reference(measure, framework, result, reference):
    """Compare a loss, its worst quantity and its worst gradient with those of `loss_reference`."""
    (value, aux, grads), (expected, expected_aux, expected_grads) = result, reference
    aux, expected_aux = (on_jvp_rows(quantities, expected_aux) for quantities in (aux, expected_aux))
    measure.compare(framework, "loss (reference)", value, expected, BOUND)
    measure.compare_worst(framework, "aux (reference)", aux, expected_aux, BOUND)
    measure.compare_worst(framework, "grad (reference)", grads, expected_grads, BOUND)


def against_formula(measure, framework, result, formula):
    """Compare a loss, every quantity that the oracle has, and the worst gradient with the oracle's."""
    (value, aux, grads), (expected, expected_aux, expected_grads) = result, formula
    aux, expected_aux = (on_jvp_rows(quantities, expected_aux) for quantities in (aux, expected_aux))
    measure.compare(framework, "loss (formula)", value, expected, BOUND)
    for quantity in sorted(expected_aux):
        measure.compare(framework, f"{quantity} (formula)", aux[quantity], expected_aux[quantity], BOUND)
    measure.compare_worst(framework, "grad (formula)", grads, expected_grads, BOUND)


def on_jvp_rows(quantities, expected):
    """Return quantities by name, with du/dt and the tangent v_c set to 0 on the flow rows of `expected`.

    With a static split nothing reads them on flow rows: a loss has no du/dt, and v_c is that of the dropped label.
    """
    jvp_row = (expected["r"] < expected["t"])[:, None, None, None]
    return {name: a * jvp_row if name in ("du_dt", "v_c") else a for name, a in quantities.items()}


def parts(network: str, setting: dict, measure: Measure) -> None:
    """The loss of a batch and the result of each row, against those of its micro-batches."""
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


def train(network: str, method: dict, options: dict, measure: Measure) -> None:
    """Parameters, EMAs and what is logged, in ten of the trainers' own steps."""
    cfg = config(network, train=options, method=method)
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


def couple(network: str, guidance: float, with_guide: bool, measure: Measure) -> None:
    """Couplings of an EDM2 flow model, guided by itself or by another network."""
    cfg = config(network)
    (rows, draws), images = batch(cfg), {}
    for name, f, net in nets(cfg):
        guide = (f.build(teacher_config(), random_weights(teacher_config())),) if with_guide else ()
        images[name] = f.couple(net, draws["noise"], rows["label"], {"steps": 4}, guidance, *guide)
    measure.compare("jax-torch", "samples", images["jax"], images["torch"], BOUND)


def time_embedding(network: str, measure: Measure) -> None:
    """Errors of a copied and of a fitted time embedding against the teacher's."""
    student, teacher = config(network), config("edm2_flow", model=EDM2 | {"interval_embedder": False})
    t, r = np.sort(np.random.RandomState(4).uniform(0.01, 0.98, size=(2, 50)), axis=0)[::-1].copy()
    errors = {}
    for name, f, of_teacher in nets(teacher):
        given = f.canonical(of_teacher)
        both = fitting.copied(given), fitting.fit(given, t, r)
        errors[name] = np.array([f.embedding_error(student, weights, teacher, given, t, r) for weights in both])
        measure.add(name, "fitted / copied", errors[name][1] / errors[name][0], bound=1.0)
    measure.compare("jax-torch", "error", errors["jax"], errors["torch"], BOUND)


def config(network: str = "dit", **changes: dict) -> base.Config:
    """Return the config of a tiny network.  changes: options by section, e.g. method={'kappa': 0}."""
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
    """Return the heads of the config's network, one letter each."""
    return "uv" if cfg.model.name == "imf_dit" else "u"


def random_weights(cfg) -> dict[str, np.ndarray]:
    """Return canonical weights, non-zero everywhere: zero layers would hide everything before them."""
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
    """Return the batch that the config's method and network take, and the draws, by name, in float64."""
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
    # Representable in float32, so that dropout masks are the same in every precision.
    draws |= {name: rng.uniform(size=BATCH_SIZE).astype(np.float32).astype(np.float64) for name in own}
    return rows_of(cfg, x, y, rng), draws


def rows_of(cfg, x, y, rng) -> dict[str, np.ndarray]:
    """Return the batch by name: images, labels, and the augmentation labels or features that the network takes."""
    c, rows = cfg.model, {"image": x, "label": y}
    if c.name == "unet" and c.augment_dim:
        rows["augment"] = rng.normal(size=(BATCH_SIZE, c.augment_dim))
    if "repa_dims" in c and c.repa_dims:
        rows["features"] = rng.normal(size=(BATCH_SIZE, (c.input_size // c.patch_size) ** 2, sum(c.repa_dims)))
    return rows


def flow_draws(cfg, draws, rng) -> dict[str, np.ndarray]:
    """Return the draws of the flow term and, if the method has one, of the MeanFlow term."""
    times_flow = rng.uniform(size=BATCH_SIZE) if cfg.method.time_sampler == "uniform" else rng.normal(size=BATCH_SIZE)
    if cfg.method.name == "flow":
        return {"noise": draws["noise"], "times": times_flow, "drop": draws["drop"]}
    both = {name: draws[name] for name in ("noise", "times", "drop")}
    return both | {"times_flow": times_flow, "noise_flow": rng.normal(size=draws["noise"].shape)}


def given(cfg) -> dict[str, np.ndarray]:
    """Return the network's additional training inputs, beyond (z, t, r, y), by name."""
    rows, draws = batch(cfg)
    if cfg.model.name == "imf_dit":
        return {"omega": 1 + 7 * draws["omega"], "t_min": draws["t_min"] / 2, "t_max": (1 + draws["t_max"]) / 2}
    augment = {name: a for name, a in rows.items() if name == "augment"}
    return augment | ({"dropout": draws["dropout"]} if cfg.model.name == "unet" and cfg.model.dropout else {})


def times() -> tuple[np.ndarray, np.ndarray]:
    """Return t and r < t [b]."""
    drawn = np.sort(np.random.RandomState(2).uniform(size=(BATCH_SIZE, 2)))
    return drawn[:, 1], drawn[:, 0]


def jvp_inputs(cfg) -> tuple:
    """Return z, t, r, y and a tangent of z."""
    rows, draws = batch(cfg)
    return rows["image"], *times(), rows["label"], (rows | draws)["noise"]
