"""The training step: schedules, clipping, EMA, and independence of how a batch is divided."""

import numpy as np
import pytest
import torch

from configs import base, digits
from torch_impl import step

# Times are sorted: cut off, they make more flow rows by chance, and means over rows of a kind are of a micro-batch.
CHANGES = {
    "model.input_size": 4, "model.width": 4, "model.channel_mult": (1,), "model.dropout": 0.4,
    "model.compute_dtype": "float64", "method.time_order": "sorted", "train.batch_size": 16,
    "train.learning_rate": 1e-2, "train.ema_decays": (0.0, 0.75), "train.ema_every": 1, "train.compile": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def float64():
    """Draw and compare in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trained(num_steps=2, **changes):
    """Return the state after some steps of a tiny network, with dropout and labels, on random images."""
    config = digits.get_config("unet")
    config.update_from_flattened_dict(CHANGES)
    config.train.update(changes)
    state, train_step = step.create_state(config, None, torch.device("cpu")), step.make_train_step(config)
    rng = np.random.RandomState(0)
    for _ in range(num_steps):
        batch = {"image": rng.randn(16, 4, 4, 1), "label": rng.randint(0, 10, 16), "augment": rng.randn(16, 6)}
        state, metrics = train_step(state, step.put_batch(batch, torch.device("cpu")))
    return state, step.reduce_metrics(metrics)


def test_micro_batches_change_nothing():
    (whole, m), (parts, n) = trained(), trained(accumulate=2)
    for a, b in zip(whole.net.parameters(), parts.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert m == pytest.approx(n, rel=1e-6)


def test_the_ema_follows_the_parameters_at_its_own_pace():
    state, _ = trained(num_steps=1)
    fresh = step_zero()
    for name, p in state.net.named_parameters():
        torch.testing.assert_close(state.emas[0][name], p.detach())
        torch.testing.assert_close(state.emas[1][name], 0.75 * fresh[name] + 0.25 * p.detach())


def step_zero():
    """Return the parameters before the first step."""
    config = digits.get_config("unet")
    config.update_from_flattened_dict(CHANGES)
    return {name: p.detach() for name, p in step.build_net(config).named_parameters()}


def after(params, config):
    """Return the EMAs after an EMA step for each row of `params`, in place of what the optimizer would make."""
    config.learning_rate = 0.0
    net = torch.nn.Module()
    net.w = torch.nn.Parameter(params[0].clone())
    emas = tuple({"w": params[0].clone()} for _ in config.ema_decays)
    state = step.TrainState(0, net, step.make_optimizer(net, config), emas, net)
    history = []
    for row in params[1:]:
        net.w.data.copy_(row)
        net.w.grad = torch.zeros_like(row)
        state, _ = step.apply_gradients(state, config)
        history.append(torch.stack([ema["w"] for ema in state.emas]).numpy())
    return np.stack(history, axis=1)


def test_an_ema_every_four_steps_is_the_closed_form():
    config, params = base.get_config().train, np.random.RandomState(0).randn(10, 3)
    config.ema_decays, config.ema_every = (0.9, 0.99995), 4
    for decay, found in zip(config.ema_decays, after(torch.tensor(params), config), strict=True):
        d = decay**4
        fourth = d * params[0] + (1 - d) * params[4]
        eighth = d**2 * params[0] + d * (1 - d) * params[4] + (1 - d) * params[8]
        expected = np.repeat([params[0], fourth, eighth], [3, 4, 2], axis=0)  # updated at steps 4 and 8 alone
        np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("every", [1, 16])
def test_a_constant_parameter_is_a_fixed_point_of_an_ema_in_float32(every):
    config, values = base.get_config().train, np.random.RandomState(0).randn(100).astype(np.float32)
    config.ema_decays, config.ema_every = (0.99995, 0.9999), every
    last = after(torch.from_numpy(values).expand(34, 100), config)[:, -1]
    assert last.dtype == np.float32
    np.testing.assert_array_max_ulp(last, np.stack([values] * 2), maxulp=1)


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
