"""The training step: schedules, clipping, EMA, and independence of how a batch is divided."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import digits
from jax_impl import step
from jax_impl.methods import rectified
from jax_impl.models import edm2
from meanflow.config import options, store
from meanflow.data import draws

CHANGES = {
    "model.input_size": 4, "model.width": 4, "model.channel_mult": (1,), "model.dropout": 0.4,
    "model.compute_dtype": "float64", "train.batch_size": 16,
    "train.learning_rate": 1e-2, "train.ema_decays": (0.0, 0.75), "train.ema_every": 1, "train.compile": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def float64(optimize_less):
    """Compare in float64."""
    with jax.enable_x64(True):
        yield


@functools.cache
def compiled(config):
    """Return the step of a config, given as text."""
    config = store.from_json(config)
    return step.make_train_step(config, step.build_net(config)[0], step.make_mesh(config))


def trained(num_steps=2, **changes):
    """Return the state after some steps of a tiny network, with dropout and labels, on random images."""
    config = digits.get_config("unet")
    config.update_from_flattened_dict(CHANGES)
    config.train.update(changes)
    mesh = step.make_mesh(config)
    _, state = step.create_state(config, mesh)
    train_step = compiled(store.to_json(config))
    rng = np.random.RandomState(0)
    metrics = {}
    for i in range(num_steps):
        batch = {"image": rng.randn(16, 4, 4, 1), "label": rng.randint(0, 10, 16), "augment": rng.randn(16, 6)}
        batch |= draws.of_process(config, i)
        state, metrics = train_step(state, step.put_batch(batch, mesh))
    return state, {name: float(a) for name, a in metrics.items()}


@pytest.mark.slow
def test_micro_batches_change_nothing():
    (whole, m), (parts, n) = trained(), trained(accumulate=2)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
    assert m == pytest.approx(n, rel=1e-6)


def test_the_ema_follows_the_parameters_at_its_own_pace():
    state, _ = trained(num_steps=1)
    fresh, _ = trained(num_steps=0)
    trees = (state.params, *state.emas, fresh.params)
    for p, exact, slow, before in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(exact, p)
        np.testing.assert_allclose(slow, 0.75 * before + 0.25 * p)


def after(params, config):
    """Return the EMAs after an EMA step for each row of `params`, in place of what the optimizer would make."""
    config.learning_rate = 0.0
    state = step.TrainState(
        jnp.zeros((), jnp.int32), params[0], step.make_optimizer(config).init(params[0]),
        tuple(params[0] for _ in config.ema_decays),
    )  # fmt: skip
    history = []
    for row in params[1:]:
        state, _ = step.apply_gradients(state._replace(params=row), jnp.zeros_like(row), config)
        history.append(np.stack(state.emas))
    return np.stack(history, axis=1)


@pytest.mark.parametrize("every", [1, 16])
def test_a_constant_parameter_is_a_fixed_point_of_an_ema_in_float32(every):
    config, values = options.get_config().train, np.random.RandomState(0).randn(100).astype(np.float32)
    config.ema_decays, config.ema_every = (0.99995, 0.9999), every
    with jax.enable_x64(False):
        last = after(jnp.broadcast_to(values, (34, 100)), config)[:, -1]
    assert last.dtype == np.float32
    np.testing.assert_array_max_ulp(last, np.stack([values] * 2), maxulp=1)


@pytest.mark.parametrize(
    ("schedule", "end", "at", "expected"),
    [
        ("constant", "steps", 0, 0.1), ("constant", "steps", 5, 0.55), ("constant", "steps", 10, 1.0),
        ("constant", "steps", 99, 1.0), ("cosine", "steps", 10, 1.0), ("cosine", "steps", 55, 0.6),
        ("cosine", "steps", 100, 0.2), ("cosine", "early", 90, 0.2), ("cosine", "early", 50, 0.6),
    ],
)  # fmt: skip
def test_learning_rates(schedule, end, at, expected):
    c = options.get_config().train
    c.update(learning_rate=1.0, schedule=schedule, cosine_end=end, steps=100, warmup_steps=10, warmup_from=0.1)
    c.final_factor = 0.2
    assert float(step.learning_rate(at, c)) == pytest.approx(expected, abs=1e-6)
    c.schedule_steps, c.steps = 100, 170  # the schedule keeps its length in a longer run, and then its floor
    assert float(step.learning_rate(at, c)) == pytest.approx(expected, abs=1e-6)
    c.warmup_steps = 0
    assert float(step.learning_rate(150, c)) == pytest.approx(0.2 if schedule == "cosine" else 1.0)


STAGES = {
    "model.compute_dtype": "float64", "method.stage1_steps": 3, "train.learning_rate": 1e-2, "train.clip_norm": 1e-3,
    "train.clip_stage": "guided", "train.optimizer": "adamw", "train.weight_decay": 0.1, "train.ema_decays": (0.5,),
    "train.schedule": "constant", "train.batch_size": 8,
}  # fmt: skip


class Layers(nnx.Module):
    """In the place of EDM2's network its layers, few enough to be compiled at once."""

    def __init__(self, c):
        self.fourier = edm2.MPFourier(4)
        self.time, self.conv, self.out = (edm2.MPConv(*sizes) for sizes in ((4, 4, 0), (1, 4, 3), (4, 1, 3)))
        self.out_gain = nnx.Param(jnp.ones(()))

    def tables(self):
        return {}

    def __call__(self, z, t):
        h = edm2.mp_silu(self.conv(z) + self.time(self.fourier(t))[:, None, None])
        return self.out(h, gain=self.out_gain[...])


def error_of_forwards(net, batch, draws, cfg):
    """Return a loss of a forward, a thousandfold if guided; `projection` is the size of a weight."""
    err = jnp.square(net(batch["noise"], draws.times) - batch["image"]).sum((1, 2, 3)) * (1000 if cfg.guidance else 1)
    return err.mean(), {"err": err, "projection": jnp.sqrt(jnp.square(net.out.kernel[...]).mean())}


@functools.cache
def staged():
    """Return the step of a tiny run in two stages, its mesh and a function (factor of the weights) -> state."""
    config = digits.get_config("remeanflow")
    config.update_from_flattened_dict(STAGES)
    mesh = step.make_mesh(config)
    graphdef, state = step.create_state(config, mesh)

    def start(factor):
        rng, params = np.random.RandomState(0), []
        for path, leaf in nnx.to_flat_state(state.params):
            drawn = rng.randn(*leaf.shape) * (factor if path[-1] == "kernel" else 1)
            params.append((path, leaf.replace(jnp.asarray(drawn))))
        params = nnx.from_flat_state(params)
        begun = jax.tree.map(jnp.copy, state)._replace(params=params, emas=(jax.tree.map(jnp.copy, params),))
        return jax.device_put(begun, step.state_shardings(begun, mesh))

    return step.make_train_step(config, graphdef, mesh), mesh, start, config


def flat(params):
    """Return {path: array} of parameters, in numpy."""
    return {path: np.array(leaf[...]) for path, leaf in nnx.to_flat_state(params)}


def step_of_stage(monkeypatch, stage, factor=1.0, num_steps=1):
    """Return {path: array} before and after some steps of a stage, their first moments, the EMA, and the metrics."""
    monkeypatch.setattr(rectified, "loss", error_of_forwards)
    monkeypatch.setitem(step.ARCHITECTURES, "edm2", Layers)
    train_step, mesh, start, config = staged()
    state, rng, metrics = start(factor), np.random.RandomState(0), {}
    before = flat(state.params)
    for i in range(num_steps):
        batch = {"image": rng.randn(8, 4, 4, 1), "noise": rng.randn(8, 4, 4, 1), "label": rng.randint(0, 10, 8)}
        batch |= draws.of_process(config, i)
        state, metrics = train_step(state, step.put_batch(batch, mesh), stage)
    trees = (before, flat(state.params), flat(optax.tree.get(state.opt_state, "mu")), flat(state.emas[0]))
    return *trees, {name: float(a) for name, a in metrics.items()}


def test_each_stage_has_its_own_objective_and_clipping(monkeypatch):
    """The second is guided, and it alone clips."""
    for stage, clips in ((0, False), (1, True)):
        *_, moments, _, metrics = step_of_stage(monkeypatch, stage)
        norm = np.sqrt(sum(np.square(a).sum() for a in moments.values())) / 0.1
        assert norm == pytest.approx(1e-3 if clips else metrics["grad_norm"], rel=1e-6)
        assert metrics["grad_norm"] > 0.01
        losses = metrics["loss"] if stage == 0 else metrics["loss"] / 1000
        assert losses == pytest.approx(step_of_stage(monkeypatch, 0)[-1]["loss"], rel=1e-6)


def test_other_networks_are_not_projected():
    config, state = digits.get_config("unet"), object()
    assert step.project(state, config) is state
    assert edm2.normalize_weights in step.PROJECTIONS.values() and set(step.PROJECTIONS) == {"edm2"}


def test_an_abstract_network_is_drawn_from_nothing(monkeypatch):
    monkeypatch.setitem(step.ARCHITECTURES, "edm2", Layers)
    config = digits.get_config("remeanflow")
    config.update_from_flattened_dict(STAGES)
    graphdef, shapes = step.abstract_net(config)
    assert all(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(shapes))
    _, drawn = step.build_net(config)
    assert jax.tree.structure(shapes) == jax.tree.structure(drawn)
    for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(drawn), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    assert isinstance(nnx.merge(graphdef, drawn), Layers)
