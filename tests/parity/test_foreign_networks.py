"""The losses on networks that know nothing of this project, made of the frameworks' own layers."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import jax_impl.methods as jax_methods
import torch_impl.methods as torch_methods
from parity.adapters.frameworks import full_precision
from parity.cases import objectives
from parity.cases.settings import DRAWN_SCALES, RE2
from parity.checks import Measure

NUM_CLASSES, CHANNELS, WIDTH, BATCH_SIZE, SIZE = 5, 3, 6, 8, 4
TOKENS, DIMS = SIZE * SIZE, (3, 4)  # REPA: of the image, and of each encoder


class JaxNet(nnx.Module):
    """u = net(z, t, r, y)."""

    num_classes = NUM_CLASSES

    def __init__(self, rngs):
        self.embed = nnx.Embed(NUM_CLASSES + 1, WIDTH, rngs=rngs)
        self.first = nnx.Conv(CHANNELS, WIDTH, (3, 3), rngs=rngs)
        self.last = nnx.Conv(WIDTH, CHANNELS, (3, 3), rngs=rngs)

    def __call__(self, z, t, r, y):
        return self.last(self.hidden(z, t, r, y))

    def hidden(self, z, t, r, y):
        c = self.embed(y) * jnp.exp(t)[:, None] + jnp.sin(3 * r)[:, None]
        return jnp.tanh(self.first(z) + c[:, None, None, :])


class JaxImproved(JaxNet):
    """Two heads, and what it is told of guidance."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.last_v = nnx.Conv(WIDTH, CHANNELS, (3, 3), rngs=rngs)

    def __call__(self, z, t, r, y, omega, t_min, t_max, heads="u"):
        h = self.hidden(z, t, r, y) * (1 / omega + t_min - jnp.cos(t_max))[:, None, None, None]
        return {"u": self.last, "v": self.last_v}[heads](h) if heads != "uv" else (self.last(h), self.last_v(h))


class JaxDecoupled(JaxNet):
    """A log-variance of its own."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.variance = nnx.Linear(2, 1, rngs=rngs)

    def log_variance(self, t, r):
        return self.variance(jnp.stack([t, r], axis=-1))[:, 0]


class JaxFlow(JaxNet):
    """Projected features for REPA."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.projectors = nnx.List([nnx.Linear(WIDTH, dim, rngs=rngs) for dim in DIMS])

    def __call__(self, z, t, r, y, features=False):
        h = self.hidden(z, t, r, y)
        tokens = h.reshape(len(h), TOKENS, WIDTH)
        return (self.last(h), [project(tokens) for project in self.projectors]) if features else self.last(h)


class TorchNet(torch.nn.Module):
    """u = net(z, t, r, y)."""

    num_classes = NUM_CLASSES

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(NUM_CLASSES + 1, WIDTH)
        self.first = torch.nn.Conv2d(CHANNELS, WIDTH, 3, padding=1)
        self.last = torch.nn.Conv2d(WIDTH, CHANNELS, 3, padding=1)

    def forward(self, z, t, r, y):
        return self.last(self.hidden(z, t, r, y))

    def hidden(self, z, t, r, y):
        c = self.embed(y) * torch.exp(t)[:, None] + torch.sin(3 * r)[:, None]
        return torch.tanh(self.first(z) + c[:, :, None, None])


class TorchImproved(TorchNet):
    """Two heads, and what it is told of guidance."""

    def __init__(self):
        super().__init__()
        self.last_v = torch.nn.Conv2d(WIDTH, CHANNELS, 3, padding=1)

    def forward(self, z, t, r, y, omega, t_min, t_max, heads="u"):
        h = self.hidden(z, t, r, y) * (1 / omega + t_min - torch.cos(t_max))[:, None, None, None]
        return {"u": self.last, "v": self.last_v}[heads](h) if heads != "uv" else (self.last(h), self.last_v(h))


class TorchDecoupled(TorchNet):
    """A log-variance of its own."""

    def __init__(self):
        super().__init__()
        self.variance = torch.nn.Linear(2, 1)

    def log_variance(self, t, r):
        return self.variance(torch.stack([t, r], dim=-1))[:, 0]


class TorchFlow(TorchNet):
    """Projected features for REPA."""

    def __init__(self):
        super().__init__()
        self.projectors = torch.nn.ModuleList([torch.nn.Linear(WIDTH, dim) for dim in DIMS])

    def forward(self, z, t, r, y, features=False):
        h = self.hidden(z, t, r, y)
        tokens = h.flatten(2).mT
        return (self.last(h), [project(tokens) for project in self.projectors]) if features else self.last(h)


NETWORKS = {
    "jax": {"improved": JaxImproved, "decoupled": JaxDecoupled, "flow": JaxFlow},
    "torch": {"improved": TorchImproved, "decoupled": TorchDecoupled, "flow": TorchFlow},
}
KAPPA = {"omega": 0.6, "kappa": 0.5, "guidance_start": 0.1, "guidance_end": 0.8, "label_drop_prob": 0.3}
SPLIT = {"flow_fraction": 0.25, "adaptive_power": 0.75}  # rows with r < t and flow rows, interleaved
SETTINGS = {
    "meanflow": KAPPA | SPLIT,
    "improved": SPLIT | {"label_drop_prob": 0.3},
    "flow": {"label_drop_prob": 0.3, "repa_coeff": 0.7},
    "decoupled": {"omega": 0.6, "guidance_start": 0.1, "guidance_end": 0.8, "label_drop_prob": 0.3},
    "distilled": {"guidance_type": "distill", "omega": 1.5, "guidance_start": 0.1, "guidance_end": 0.8},
    "rectified": SPLIT | RE2 | DRAWN_SCALES | {"distance_clip": 2.0},
}


# A network of this project that each method trains, for its config alone.
OURS = {
    "meanflow": "dit",
    "improved": "imf",
    "flow": "dmf_sit",
    "decoupled": "dmf",
    "distilled": "dmf",
    "rectified": "edm2",
}


def settings(name):
    cfg = objectives.config(OURS[name], method=SETTINGS[name]).method
    return cfg.name, cfg


def inputs(method, cfg):
    """Return a batch and draws by name, in float64."""
    rng = np.random.RandomState(0)
    shape = (BATCH_SIZE, SIZE, SIZE, CHANNELS)
    batch = {"image": rng.normal(size=shape), "label": rng.randint(0, NUM_CLASSES, BATCH_SIZE)}
    batch |= {"noise": rng.normal(size=shape)} if method == "rectified" else {}
    batch |= {"features": rng.normal(size=(BATCH_SIZE, TOKENS, sum(DIMS)))} if method == "flow" else {}
    draws = {name: rng.uniform(size=BATCH_SIZE) for name in jax_methods.METHODS[method].Draws._fields}
    draws |= {name: rng.normal(size=shape) for name in ("noise", "noise_flow") if name in draws}
    if method != "rectified":
        draws["times"] = rng.normal(size=BATCH_SIZE if method == "flow" else (BATCH_SIZE, 2))
    return batch, draws


def in_jax(name):
    """Return the value, aux and gradients of `loss` and of `loss_reference`."""
    method, cfg = settings(name)
    batch, draws = jax.tree.map(jnp.asarray, inputs(method, cfg))
    module, rng = jax_methods.METHODS[method], np.random.RandomState(1)

    def build(cls):
        graphdef, params = nnx.split(cls(nnx.Rngs(0)))
        return graphdef, jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.3, a.shape)), params)

    teacher = {"teacher": nnx.merge(*build(JaxNet))} if name == "distilled" else {}
    graphdef, params = build(NETWORKS["jax"].get(method, JaxNet))

    @jax.jit
    def both(params):
        def of(function):
            return lambda params: function(nnx.merge(graphdef, params), batch, module.Draws(**draws), cfg, **teacher)

        functions = (module.loss, module.loss_reference)
        return [jax.value_and_grad(of(function), has_aux=True)(params) for function in functions]

    for (value, aux), grads in jax.tree.map(np.asarray, both(params)):
        named = {jax.tree_util.keystr(path): a for path, a in jax.tree_util.tree_leaves_with_path(grads)}
        yield value, aux, named


def in_torch(name):
    """Return the same."""
    method, cfg = settings(name)
    batch, draws = inputs(method, cfg)
    images_first = {name: torch.from_numpy(a).movedim(-1, 1) if a.ndim == 4 else torch.from_numpy(a)
                    for name, a in (batch | draws).items()}  # fmt: skip
    batch = {name: images_first[name] for name in batch}
    module = torch_methods.METHODS[method]
    generator = torch.Generator().manual_seed(1)

    def build(cls):
        net = cls().double()
        for p in net.parameters():
            torch.nn.init.normal_(p, 0, 0.3, generator=generator)
        return net

    teacher = {"teacher": build(TorchNet)} if name == "distilled" else {}
    net = build(NETWORKS["torch"].get(method, TorchNet))
    drawn = module.Draws(**{name: images_first[name] for name in module.Draws._fields})
    for function in (module.loss, module.loss_reference):
        value, aux = function(net, batch, drawn, cfg, **teacher)
        grads = torch.autograd.grad(value, list(net.parameters()))
        names = [name for name, _ in net.named_parameters()]
        aux = {name: a.movedim(1, -1) if a.ndim == 4 else a for name, a in aux.items()}
        yield (
            value.detach().numpy(),
            {name: a.detach().numpy() for name, a in aux.items()},
            {name: g.numpy() for name, g in zip(names, grads, strict=True)},
        )


@pytest.fixture(autouse=True)
def in_float64(optimize_less):
    with full_precision():
        yield


def failures(framework, name):
    """Return what differs between `loss` and `loss_reference`."""
    loss, reference = {"jax": in_jax, "torch": in_torch}[framework](name)
    assert loss[0].dtype == np.float64
    measure = Measure(name)
    objectives.against_reference(measure, framework, loss, reference)
    return [check.quantity for check in measure.checks if not check.ok]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_the_loss_is_that_of_the_reference(framework, name):
    assert failures(framework, name) == []


MISTAKES = {
    "no tangent": ("total_derivative", lambda original: lambda *args: 0 * original(*args)),
    "no tangent of z": (
        "total_derivative",
        lambda original: lambda net, z, v, *args: original(net, z, 0 * v, *args),
    ),
    "t and r change places": ("interval", lambda original: lambda t, r, cfg: original(r, t, cfg)),
    "guidance away from the class": (
        "guide",
        lambda original: lambda net, z, v, *args: 2 * v - original(net, z, v, *args),
    ),
    "labels that are kept": ("drop_labels", lambda original: lambda y, *args: (y, original(y, *args)[1])),
    "a weight with a gradient": (
        "weigh",
        lambda original: lambda err, cfg: (original(err, cfg)[0], err / (err + cfg.adaptive_eps) ** cfg.adaptive_power),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_mistake_in_the_loss_is_seen(framework, mistake, monkeypatch):
    method = {"jax": jax_methods, "torch": torch_methods}[framework].meanflow
    name, mutated = MISTAKES[mistake]
    monkeypatch.setattr(method, name, mutated(getattr(method, name)))
    found = failures(framework, "meanflow")
    assert any(quantity.startswith("grad (reference)") for quantity in found)
    assert (len(found) == 3) == (mistake != "a weight with a gradient"), found


def test_the_example_of_the_docs_runs():
    text, names = (pathlib.Path(__file__).parents[2] / "docs/methods.md").read_text(), {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], names)
    np.testing.assert_allclose(names["loss"], names["expected"], rtol=1e-6)
    assert names["aux"]["u"].shape == names["images"].shape == (8, 4, 4, 3)
