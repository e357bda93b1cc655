"""The loop of the samplers: which forwards it runs, and what it needs.  What it computes is parity's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_impl.methods import samplers
from meanflow.config import options
from meanflow.sampling import steps as sampling

pytestmark = pytest.mark.usefixtures("optimize_less")


@pytest.fixture(autouse=True)
def float64():
    """Compute in float64."""
    with jax.enable_x64(True):
        yield


def settings(**changes):
    flow = changes.get("sampler") in ("heun", "sde")
    cfg = options.get_config(method="flow" if flow else "meanflow").sample
    cfg.update(changes)
    return cfg


def carry(net, noise, cfg, steps, fresh=None, label=0):
    """Return the numbers that the noise [b] becomes, with fresh noise [steps - 1 b]; every row has the label."""
    noise = jnp.asarray(noise, jnp.float64).reshape(-1, 1, 1, 1)
    given = {} if fresh is None else {"fresh": jnp.asarray(fresh, jnp.float64).reshape(-1, *noise.shape)}
    images = samplers.integrate(net, noise, jnp.full(len(noise), label), given, cfg, steps)
    return np.asarray(images)[:, 0, 0, 0]


class Told:
    """A velocity of state, both times and label, to take a step by hand; it records the batch size of each call."""

    num_classes = 9

    def __init__(self):
        self.calls = []

    def __call__(self, z, t, r, y):
        self.calls.append(len(y))
        return z * t.reshape(z.shape) + r.reshape(z.shape) + y.reshape(z.shape)


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
    with jax.disable_jit():  # else both branches are traced
        carry(net, [0.0, 1.0], cfg, sampling.flow_steps(cfg))
    assert net.calls == calls


@pytest.mark.parametrize(("sampler", "make_steps"), [("restart", "flow_map_steps"), ("sde", "flow_steps")])
def test_fresh_noise_must_be_given(sampler, make_steps):
    cfg = settings(sampler=sampler, steps=2)
    steps = getattr(sampling, make_steps)(cfg)
    with pytest.raises(ValueError, match=f"the sampler {sampler} needs fresh noise: give `fresh`"):
        carry(Told(), [1.0], cfg, steps)
    carry(Told(), [1.0], cfg, steps[-1:])
