"""The training step: schedules, clipping, EMA, and independence of how a batch is divided."""

import numpy as np
import pytest
import torch

from configs import digits
from meanflow.config import options
from meanflow.data import draws
from torch_impl import step
from torch_impl.methods import rectified
from torch_impl.models import edm2

CHANGES = {
    "model.input_size": 4, "model.width": 4, "model.channel_mult": (1,), "model.dropout": 0.4,
    "model.compute_dtype": "float64", "train.batch_size": 16,
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
    for i in range(num_steps):
        batch = {"image": rng.randn(16, 4, 4, 1), "label": rng.randint(0, 10, 16), "augment": rng.randn(16, 6)}
        batch |= draws.of_process(config, i)
        state, metrics = train_step(state, step.put_batch(batch, torch.device("cpu")))
    return state, step.reduce_metrics([metrics])[0]


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
    config, params = options.get_config().train, np.random.RandomState(0).randn(10, 3)
    config.ema_decays, config.ema_every = (0.9, 0.99995), 4
    for decay, found in zip(config.ema_decays, after(torch.tensor(params), config), strict=True):
        d = decay**4
        fourth = d * params[0] + (1 - d) * params[4]
        eighth = d**2 * params[0] + d * (1 - d) * params[4] + (1 - d) * params[8]
        expected = np.repeat([params[0], fourth, eighth], [3, 4, 2], axis=0)  # updated at steps 4 and 8 alone
        np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("every", [1, 16])
def test_a_constant_parameter_is_a_fixed_point_of_an_ema_in_float32(every):
    config, values = options.get_config().train, np.random.RandomState(0).randn(100).astype(np.float32)
    config.ema_decays, config.ema_every = (0.99995, 0.9999), every
    last = after(torch.from_numpy(values).expand(34, 100), config)[:, -1]
    assert last.dtype == np.float32
    np.testing.assert_array_max_ulp(last, np.stack([values] * 2), maxulp=1)


def test_clipping_scales_the_gradients_to_the_norm():
    config = options.get_config().train
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
    c = options.get_config().train
    c.update(learning_rate=1.0, schedule=schedule, cosine_end=end, steps=100, warmup_steps=10, warmup_from=0.1)
    c.final_factor = 0.2
    assert float(step.learning_rate(at, c)) == pytest.approx(expected, abs=1e-6)
    c.schedule_steps, c.steps = 100, 170  # the schedule keeps its length in a longer run, and then its floor
    assert float(step.learning_rate(at, c)) == pytest.approx(expected, abs=1e-6)
    c.warmup_steps = 0
    assert float(step.learning_rate(150, c)) == pytest.approx(0.2 if schedule == "cosine" else 1.0)


def test_noise_is_laid_out_as_its_image():
    batch = {"image": np.random.RandomState(0).randn(2, 4, 6, 3), "label": np.array([0, 1])}
    found = step.put_batch(batch | {"noise": 2 * batch["image"]}, torch.device("cpu"))
    assert found["image"].shape == (2, 3, 4, 6)
    torch.testing.assert_close(found["noise"], 2 * found["image"])


STAGES = {
    "model.compute_dtype": "float64", "method.stage1_steps": 3, "train.learning_rate": 1e-2, "train.clip_norm": 1e-3,
    "train.clip_stage": "guided", "train.optimizer": "adamw", "train.weight_decay": 0.1, "train.ema_decays": (0.5,),
    "train.schedule": "constant", "train.batch_size": 8, "train.compile": False,
}  # fmt: skip


class Layers(torch.nn.Module):
    """In the place of EDM2's network its layers."""

    def __init__(self, c):
        super().__init__()
        self.fourier = edm2.MPFourier(4)
        self.time, self.conv, self.out = (edm2.MPConv(*sizes) for sizes in ((4, 4, 0), (1, 4, 3), (4, 1, 3)))
        self.out_gain = torch.nn.Parameter(torch.ones(1))

    def tables(self):
        return {}

    def forward(self, z, t):
        h = edm2.mp_silu(self.conv(z) + self.time(self.fourier(t))[:, :, None, None])
        return self.out(h, gain=self.out_gain)


def error_of_forwards(net, batch, draws, cfg):
    """Return a loss of a forward, a thousandfold if guided; `projection` is the size of a weight."""
    err = (net(batch["noise"], draws.times) - batch["image"]).square().sum((1, 2, 3)) * (1000 if cfg.guidance else 1)
    return err.mean(), {"err": err.detach(), "projection": net.out.weight.detach().square().mean().sqrt()}


def step_of_stage(monkeypatch, stage, factor=1.0, num_steps=1):
    """Return {name: tensor} before and after some steps of a stage, their first moments, the EMA, and the metrics."""
    monkeypatch.setattr(rectified, "loss", error_of_forwards)
    monkeypatch.setitem(step.ARCHITECTURES, "edm2", Layers)
    config, rng = digits.get_config("remeanflow"), np.random.RandomState(0)
    config.update_from_flattened_dict(STAGES)
    drawn = {name: torch.from_numpy(rng.randn(*p.shape)) for name, p in step.build_net(config).named_parameters()}
    before = {name: a * factor if name.endswith(".weight") else a for name, a in drawn.items()}
    state = step.create_state(config, None, torch.device("cpu"), before)
    train_step, metrics = step.make_train_step(config), {}
    for i in range(num_steps):
        batch = {"image": rng.randn(8, 4, 4, 1), "noise": rng.randn(8, 4, 4, 1), "label": rng.randint(0, 10, 8)}
        batch |= draws.of_process(config, i)
        state, metrics = train_step(state, step.put_batch(batch, torch.device("cpu")), stage)
    after = {name: p.detach() for name, p in state.net.named_parameters()}
    moments = {name: state.optimizer.state[p]["exp_avg"] for name, p in state.net.named_parameters()}
    return before, after, moments, state.emas[0], step.reduce_metrics([metrics])[0]


def test_weights_are_projected_before_the_gradient(monkeypatch):
    """So that it makes no difference how long they were, but for an epsilon."""
    runs = [step_of_stage(monkeypatch, 0, factor) for factor in (1.0, 5.0)]
    (_, after, moments, _, metrics), (before, *other, _, n) = runs
    assert n["projection"] == pytest.approx(1, abs=1e-3) and metrics == pytest.approx(n, rel=1e-3)
    for name, a in after.items():
        torch.testing.assert_close(a, other[0][name], rtol=0, atol=1e-3)
        torch.testing.assert_close(moments[name], other[1][name], rtol=0, atol=1e-3 * metrics["grad_norm"])
        if name.endswith(".weight"):
            size = before[name].square().mean(tuple(range(1, a.ndim)), keepdim=True).sqrt()
            moved = (a - 0.999 * before[name] / (1e-4 + size)).abs().max()  # the weight decays, and Adam takes 1e-2
            assert 1e-3 < moved < 1.2e-2, name


def test_each_stage_has_its_own_objective_and_clipping(monkeypatch):
    """The second is guided, and it alone clips."""
    for stage, clips in ((0, False), (1, True)):
        *_, moments, _, metrics = step_of_stage(monkeypatch, stage)
        norm = np.sqrt(sum(float(a.square().sum()) for a in moments.values())) / 0.1
        assert norm == pytest.approx(1e-3 if clips else metrics["grad_norm"], rel=1e-6)
        assert metrics["grad_norm"] > 0.01
        losses = metrics["loss"] if stage == 0 else metrics["loss"] / 1000
        assert losses == pytest.approx(step_of_stage(monkeypatch, 0)[-1]["loss"], rel=1e-6)


def test_frequencies_and_phases_never_change(monkeypatch):
    before, after, _, ema, _ = step_of_stage(monkeypatch, 0, num_steps=2)
    fixed = [name for name in after if name.endswith(("freqs", "phases"))]
    assert len(fixed) == 2
    for name, a in after.items():
        assert torch.equal(a, before[name]) == torch.equal(ema[name], before[name]) == (name in fixed), name


def test_other_networks_are_not_projected():
    config, state = digits.get_config("unet"), object()
    assert step.project(state, config) is state
    assert edm2.normalize_weights in step.PROJECTIONS.values() and set(step.PROJECTIONS) == {"edm2"}
