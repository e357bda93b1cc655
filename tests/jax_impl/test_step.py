"""The training step: schedules, clipping, EMA, and independence of how a batch is divided."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base, digits
from jax_impl import step


@pytest.fixture(autouse=True)
def float64():
    """Compare in float64."""
    with jax.enable_x64(True):
        yield


def trained(num_steps=2, **changes):
    """Return the state after some steps of a tiny network on random images."""
    config = digits.get_config()
    config.model.update(depth=1, width=16, num_heads=2, compute_dtype="float64")
    config.train.update(batch_size=16, learning_rate=1e-2, **changes)
    mesh = step.make_mesh(config)
    graphdef, state = step.create_state(config, mesh)
    train_step = step.make_train_step(config, graphdef, mesh)
    rng = np.random.RandomState(0)
    metrics = {}
    for _ in range(num_steps):
        batch = step.put_batch({"image": rng.randn(16, 8, 8, 1), "label": rng.randint(0, 10, 16)}, mesh)
        state, metrics = train_step(state, batch)
    return state, {name: float(a) for name, a in metrics.items()}


def test_micro_batches_change_nothing():
    (whole, m), (parts, n) = trained(), trained(accumulate=2)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
    assert m == pytest.approx(n, rel=1e-6)


def test_the_ema_follows_the_parameters_at_its_own_pace():
    state, _ = trained(num_steps=1, ema_decays=(0.0, 0.75))
    fresh, _ = trained(num_steps=0)
    trees = (state.params, *state.emas, fresh.params)
    for p, exact, slow, before in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(exact, p)
        np.testing.assert_allclose(slow, 0.75 * before + 0.25 * p)


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
