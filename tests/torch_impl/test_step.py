"""The training step: schedules, clipping, EMA, and independence of how a batch is divided."""

import numpy as np
import pytest
import torch

from configs import base, digits
from torch_impl import step


@pytest.fixture(autouse=True)
def float64():
    """Draw and compare in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trained(num_steps=2, **changes):
    """Return the state after some steps of a tiny network on random images."""
    config = digits.get_config()
    config.model.update(depth=1, width=16, num_heads=2, compute_dtype="float64")
    config.train.update(batch_size=16, compile=False, learning_rate=1e-2, **changes)
    state, train_step = step.create_state(config, None, torch.device("cpu")), step.make_train_step(config)
    rng = np.random.RandomState(0)
    for _ in range(num_steps):
        batch = step.put_batch({"image": rng.randn(16, 8, 8, 1), "label": rng.randint(0, 10, 16)}, torch.device("cpu"))
        state, metrics = train_step(state, batch)
    return state, step.reduce_metrics(metrics)


def test_micro_batches_change_nothing():
    (whole, m), (parts, n) = trained(), trained(accumulate=2)
    for a, b in zip(whole.net.parameters(), parts.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert m == pytest.approx(n, rel=1e-6)


def test_the_ema_follows_the_parameters_at_its_own_pace():
    state, _ = trained(num_steps=1, ema_decays=(0.0, 0.75))
    fresh = step_zero()
    for name, p in state.net.named_parameters():
        torch.testing.assert_close(state.emas[0][name], p.detach())
        torch.testing.assert_close(state.emas[1][name], 0.75 * fresh[name] + 0.25 * p.detach())


def step_zero():
    """Return the parameters before the first step."""
    config = digits.get_config()
    config.model.update(depth=1, width=16, num_heads=2, compute_dtype="float64")
    return {name: p.detach() for name, p in step.build_net(config).named_parameters()}


def test_clipping_scales_the_gradients_to_the_norm():
    config = base.get_config().train
    config.clip_norm, config.ema_decays = 1.0, (0.5,)
    net = torch.nn.Linear(2, 1, bias=False)
    state = step.TrainState(0, net, step.make_optimizer(net, config), ({"weight": net.weight.detach().clone()},), net)
    net.weight.grad = torch.tensor([[3.0, 4.0]])
    state, norm = step.apply_gradients(state, config)
    assert float(norm) == pytest.approx(5.0)
    mean = state.optimizer.state[net.weight]["exp_avg"] / (1 - config.beta1)
    torch.testing.assert_close(mean, torch.tensor([[0.6, 0.8]]))


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
