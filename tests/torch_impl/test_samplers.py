"""The loop of the samplers, by hand: a step of each kind, and guidance inside its interval alone."""

import math

import numpy as np
import pytest
import torch

from meanflow.config import options
from meanflow.sampling import steps as sampling
from torch_impl.methods import samplers


def settings(**changes):
    flow = changes.get("sampler") in ("heun", "sde")
    cfg = options.get_config(method="flow" if flow else "meanflow").sample
    cfg.update(changes)
    return cfg


def carry(net, noise, cfg, steps, fresh=None, label=0):
    """Return the numbers that the noise [b] becomes, with fresh noise [steps - 1 b]; every row has the label."""
    noise = torch.tensor(noise, dtype=torch.float64).reshape(-1, 1, 1, 1)
    given = {} if fresh is None else {"fresh": torch.tensor(fresh, dtype=torch.float64).reshape(-1, *noise.shape)}
    images = samplers.integrate(net, noise, torch.full((len(noise),), label), given, cfg, steps)
    return images[:, 0, 0, 0].numpy()


class Told:
    """A velocity of state, both times and label, to take a step by hand; it records the batch size of each call."""

    num_classes = 9

    def __init__(self):
        self.calls = []

    def __call__(self, z, t, r, y):
        self.calls.append(len(y))
        return z * t.reshape(z.shape) + r.reshape(z.shape) + y.reshape(z.shape)


class Label:
    """A velocity that is the label."""

    num_classes = 9

    def __call__(self, z, t, r, y):
        return 0 * z + y.reshape(z.shape)


def test_a_step_of_ctm_by_hand():
    cfg = settings(sampler="ctm", gamma=0.6, steps=2)
    found = carry(Told(), [1.0, -2.0], cfg, sampling.flow_map_steps(cfg), [[0.5, 3.0]])
    for z, e, image in zip((1.0, -2.0), (0.5, 3.0), found, strict=True):
        at_04 = z - 0.6 * (z * 1 + 0.4)
        at_05 = 0.5 / 0.6 * at_04 + math.sqrt(0.5**2 - (0.5 / 0.6 * 0.4) ** 2) * e
        assert image == pytest.approx(at_05 - 0.5 * (at_05 * 0.5 + 0))


def test_heun_by_hand_with_a_last_step_of_euler():
    cfg = settings(sampler="heun", steps=2)
    z = 1.5
    u = z * 1 + 1
    at_05 = z - 0.25 * (u + (z - 0.5 * u) * 0.5 + 0.5)
    expected = at_05 - 0.5 * (at_05 * 0.5 + 0.5)
    assert carry(Told(), [z], cfg, sampling.flow_steps(cfg)) == pytest.approx([expected])
    one = [settings(sampler=name, steps=1) for name in ("heun", "euler")]
    heun, euler = (carry(Told(), [z], cfg, sampling.flow_steps(cfg)) for cfg in one)
    assert heun == pytest.approx(euler) and heun == pytest.approx([z - u])


@pytest.mark.parametrize("make_steps", [sampling.flow_map_steps, sampling.flow_steps])
def test_guidance_by_hand_inside_its_interval_alone(make_steps):
    """Only the step from 0.6 is guided, to no class 9 + 3 (label - 9)."""
    cfg = settings(times=(1.0, 0.6, 0.2, 0.0), cfg_scale=3.0, interval=(0.2001, 0.6))
    found = carry(Label(), [0.0, 1.0], cfg, make_steps(cfg), label=7)
    moved = 0.4 * 7 + 0.4 * (9 + 3 * (7 - 9)) + 0.2 * 7
    assert found == pytest.approx([-moved, 1 - moved])


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({"cfg_scale": 3.0}, [2, 4, 2]),
        ({"cfg_scale": 1.0}, [2, 2, 2]),
        ({"cfg_scale": 3.0, "sampler": "heun"}, [2, 2, 4, 4, 2]),
        ({"cfg_scale": 3.0, "interval": (0.0, 1.0)}, [4, 4, 4]),
    ],
)
def test_forwards_without_class_run_inside_the_interval_alone(changes, calls):
    cfg, net = settings(times=(1.0, 0.6, 0.2, 0.0), interval=(0.5, 0.9)), Told()
    cfg.update(changes)
    carry(net, [0.0, 1.0], cfg, sampling.flow_steps(cfg))
    assert net.calls == calls


def test_official_flow_models_stand_still_where_they_are_not_guided():
    given = {"times": (1.0, 0.6, 0.2, 0.0), "official": True}
    for cfg in (settings(**given), settings(**given, cfg_scale=3.0, interval=(0.7, 0.8))):
        assert carry(Told(), [0.5, 2.0], cfg, sampling.flow_steps(cfg)).tolist() == [0.5, 2.0]
    guided, ours = (settings(**given | {"official": official}, cfg_scale=3.0) for official in (True, False))
    assert sampling.flow_steps(guided) == sampling.flow_steps(ours)
    assert not np.allclose(carry(Told(), [0.5, 2.0], guided, sampling.flow_steps(guided)), [0.5, 2.0])


@pytest.mark.parametrize(("sampler", "make_steps"), [("restart", "flow_map_steps"), ("sde", "flow_steps")])
def test_fresh_noise_must_be_given(sampler, make_steps):
    cfg = settings(sampler=sampler, steps=2)
    steps = getattr(sampling, make_steps)(cfg)
    with pytest.raises(ValueError, match=f"the sampler {sampler} needs fresh noise: give `fresh`"):
        carry(Told(), [1.0], cfg, steps)
    carry(Told(), [1.0], cfg, steps[-1:])


def test_the_sampler_velocity_by_hand():
    """The network's r is t."""
    cfg = settings(sampler="velocity", times=(1.0, 0.6, 0.1))
    found = carry(Told(), [1.5, -2.0], cfg, sampling.flow_map_steps(cfg), label=3)
    for z, image in zip((1.5, -2.0), found, strict=True):
        at_06 = z - 0.4 * (z * 1 + 1 + 3)
        assert image == pytest.approx(at_06 - 0.5 * (at_06 * 0.6 + 0.6 + 3))
