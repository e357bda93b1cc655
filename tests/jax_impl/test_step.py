"""The training step: schedules, clipping, EMA, and independence of how a batch is divided."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base, digits, resolve
from jax_impl import step

# Times are sorted: cut off, they make more flow rows by chance, and means over rows of a kind are of a micro-batch.
CHANGES = {
    "model.input_size": 4, "model.width": 4, "model.channel_mult": (1,), "model.dropout": 0.4,
    "model.compute_dtype": "float64", "method.time_order": "sorted", "train.batch_size": 16,
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
    config = resolve.from_json(config)
    return step.make_train_step(config, step.build_net(config)[0], step.make_mesh(config))


def trained(num_steps=2, **changes):
    """Return the state after some steps of a tiny network, with dropout and labels, on random images."""
    config = digits.get_config("unet")
    config.update_from_flattened_dict(CHANGES)
    config.train.update(changes)
    mesh = step.make_mesh(config)
    _, state = step.create_state(config, mesh)
    train_step = compiled(resolve.to_json(config))
    rng = np.random.RandomState(0)
    metrics = {}
    for _ in range(num_steps):
        batch = {"image": rng.randn(16, 4, 4, 1), "label": rng.randint(0, 10, 16), "augment": rng.randn(16, 6)}
        state, metrics = train_step(state, step.put_batch(batch, mesh))
    return state, {name: float(a) for name, a in metrics.items()}


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


def test_an_ema_every_four_steps_is_the_closed_form():
    config, params = base.get_config().train, np.random.RandomState(0).randn(10, 3)
    config.ema_decays, config.ema_every = (0.9, 0.99995), 4
    for decay, found in zip(config.ema_decays, after(jnp.asarray(params), config), strict=True):
        d = decay**4
        fourth = d * params[0] + (1 - d) * params[4]
        eighth = d**2 * params[0] + d * (1 - d) * params[4] + (1 - d) * params[8]
        expected = np.repeat([params[0], fourth, eighth], [3, 4, 2], axis=0)  # updated at steps 4 and 8 alone
        np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("every", [1, 16])
def test_a_constant_parameter_is_a_fixed_point_of_an_ema_in_float32(every):
    config, values = base.get_config().train, np.random.RandomState(0).randn(100).astype(np.float32)
    config.ema_decays, config.ema_every = (0.99995, 0.9999), every
    with jax.enable_x64(False):
        last = after(jnp.broadcast_to(values, (34, 100)), config)[:, -1]
    assert last.dtype == np.float32
    np.testing.assert_array_max_ulp(last, np.stack([values] * 2), maxulp=1)


def test_clipping_scales_the_gradients_to_the_norm():
    config = base.get_config().train
    config.clip_norm, config.ema_decays = 1.0, (0.5,)
    params = {"w": jnp.zeros(2)}
    state = step.TrainState(jnp.zeros((), jnp.int32), params, step.make_optimizer(config).init(params), (params,))
    state, norm = step.apply_gradients(state, {"w": jnp.array([3.0, 4.0])}, config)
    assert float(norm) == pytest.approx(5.0)
    mean = optax.tree.get(state.opt_state, "mu")["w"] / (1 - config.beta1)
    np.testing.assert_allclose(mean, [0.6, 0.8])


@pytest.mark.parametrize(
    ("schedule", "end", "at", "expected"),
    [
        ("constant", "steps", 0, 0.1), ("constant", "steps", 5, 0.55), ("constant", "steps", 10, 1.0),
        ("constant", "steps", 99, 1.0), ("cosine", "steps", 10, 1.0), ("cosine", "steps", 55, 0.6),
        ("cosine", "steps", 100, 0.2), ("cosine", "early", 90, 0.2), ("cosine", "early", 50, 0.6),
    ],
)  # fmt: skip
def test_learning_rates(schedule, end, at, expected):
    c = base.get_config().train
    c.update(learning_rate=1.0, schedule=schedule, cosine_end=end, steps=100, warmup_steps=10, warmup_from=0.1)
    c.final_factor = 0.2
    assert float(step.learning_rate(at, c)) == pytest.approx(expected, abs=1e-6)
