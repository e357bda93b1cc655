"""The sampler of couplings, against EDM's algorithm written in NumPy and a flow in closed form."""

import numpy as np
import pytest
import torch

from meanflow.sampling import edm
from torch_impl.methods import reflow

MEAN, STD = 2.0, 0.5  # of the data


class Gaussian:
    """Velocity of normal data."""

    num_classes = 9

    def __call__(self, z, t, r, y):
        t = t.reshape(-1, 1, 1, 1)
        variance = ((1 - t) * STD) ** 2 + t**2
        return -MEAN + (t - (1 - t) * STD**2) / variance * (z - (1 - t) * MEAN)


class Told:
    """A velocity of state, both times and label; it keeps how many rows it was asked for."""

    num_classes = 9

    def __init__(self, factor=1.0):
        self.factor, self.rows = factor, set()

    def __call__(self, z, t, r, y):
        self.rows.add(len(y))
        t, r, y = (a.reshape(-1, 1, 1, 1) for a in (t, r, y))
        return self.factor * np.pi * z / (1 + z**2) * (1 + t) - r / 2 + t * y


def make_noise(shape=(3, 4, 4, 2)):
    return np.random.default_rng(0).normal(size=shape)


def couple(net, noise, y, schedule, *guidance):
    return reflow.couple(
        net, torch.from_numpy(noise), torch.from_numpy(y), edm.noise_levels(schedule), *guidance
    ).numpy()


def by_hand(net, noise, y, schedule, guidance=1.0, guide=None):
    """EDM, algorithm 1, for networks that take NumPy's arrays."""
    steps, sigma_min, sigma_max, rho = schedule
    sigmas = np.append(np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps) ** rho, 0)

    def estimate(net, x, sigma, y):
        t = np.full(len(x), sigma / (sigma + 1))
        return x / (1 + sigma) - sigma / (1 + sigma) * net(x / (1 + sigma), t, t, y)

    def denoised(x, sigma):
        d = estimate(net, x, sigma, y)
        worse = estimate(net, x, sigma, np.full_like(y, 9)) if guide is None else estimate(guide, x, sigma, y)
        return worse + guidance * (d - worse)

    x = sigmas[0] * noise
    for i in range(steps):
        d = (x - denoised(x, sigmas[i])) / sigmas[i]
        euler = x + (sigmas[i + 1] - sigmas[i]) * d
        if i < steps - 1:
            d_next = (euler - denoised(euler, sigmas[i + 1])) / sigmas[i + 1]
            euler = x + (sigmas[i + 1] - sigmas[i]) * (d / 2 + d_next / 2)
        x = euler
    return x


def test_the_estimate_of_the_data():
    """The posterior mean of normal data."""
    sigma = np.array([0.1, 1.0, 70.0])
    x = make_noise((3, 1, 1, 1))
    found = reflow.denoise(Gaussian(), torch.from_numpy(x), torch.from_numpy(sigma), torch.zeros(3, dtype=int))
    expected = MEAN + STD**2 / (STD**2 + sigma.reshape(x.shape) ** 2) * (x - MEAN)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("guided", ["none", "no_class", "guide"])
def test_is_the_algorithm_of_edm(steps, guided):
    noise, y, net = make_noise(), np.array([0, 3, 8]), Told()
    guidance = {"none": (), "no_class": (1.7,), "guide": (1.7, Told(0.5))}[guided]
    schedule = edm.Schedule(steps, 0.01, 20.0, 5.0)
    found = couple(net, noise, y, schedule, *guidance)
    assert net.rows == ({6} if guided == "no_class" else {3})
    np.testing.assert_allclose(found, by_hand(net, noise, y, schedule, *guidance), rtol=0, atol=1e-10)


def test_errs_in_second_order():
    noise, y = make_noise(), np.zeros(3, int)
    exact = MEAN + STD * (80 * noise - MEAN) / np.sqrt(STD**2 + 80**2)
    errors = [
        np.abs(couple(Gaussian(), noise, y, edm.Schedule(steps, sigma_min=1e-5)) - exact).max()
        for steps in (40, 80, 160)
    ]
    assert 3.5 < errors[0] / errors[1] < 4.5 and 3.5 < errors[1] / errors[2] < 4.5 and errors[2] < 1e-3
