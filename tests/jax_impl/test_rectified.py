"""What Re-MeanFlow's parts promise, beyond what the parity suite compares."""

import jax
import jax.numpy as jnp
import make_draws
import numpy as np
import pytest

from jax_impl.methods import rectified
from jax_impl.models.tape import under_jvp
from meanflow.config import options

pytestmark = pytest.mark.usefixtures("optimize_less")


@pytest.fixture(autouse=True)
def float64():
    """Compute in float64."""
    with jax.enable_x64(True):
        yield


def settings(**changes):
    cfg = options.get_config("dit", "rectified").method
    cfg.update({"flow_fraction": 0.5} | changes)
    return cfg


def draws(cfg, num=8, seed=0):
    return make_draws.in_jax(cfg, (num, 2, 2, 1), seed)


def batch():
    image, noise = np.random.RandomState(1).randn(2, 8, 2, 2, 1)
    return {"image": image, "noise": noise, "label": np.arange(8)}


def wide(*rows):
    """Return arrays [b] as [b 1 1 1]."""
    return tuple(a.reshape(-1, 1, 1, 1) for a in rows)


class Curved:
    """A nonlinear network of everything it is told, with one parameter a class; remembers (rows, under a JVP)."""

    takes_tape = True

    num_classes = 9

    def __init__(self, parameter=1.0):
        self.parameter, self.calls = parameter * jnp.ones(10), []

    def __call__(self, z, t, r, y, tape=None):
        self.calls.append((len(y), under_jvp(tape)))
        parameter, t, r, y = wide(self.parameter[y], t, r, y)
        return parameter * jnp.sin(z * (1 + y / 10) + t * t - r / 2)


def test_a_draw_is_a_function_of_its_key_and_no_two_draws_are_the_same():
    first, same, other = (draws(settings(), seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert len({tuple(np.asarray(a).tolist()) for a in first}) == len(first._fields) == 6


def test_draws_are_uniforms_but_for_the_normal_of_the_interval():
    """Bounds of five standard deviations."""
    num = 20_000
    for name, a in draws(settings(), num)._asdict().items():
        mean, std = (0, 1) if name == "interval" else (0.5, 12**-0.5)
        assert a.shape == (num,)
        assert float(a.mean()) == pytest.approx(mean, abs=5 * std * num**-0.5)
        assert float(a.std()) == pytest.approx(std, rel=0.03)
        assert (float(a.min()) >= 0 and float(a.max()) < 1) == (name != "interval")


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({}, [(8, False), (12, False), (4, True)]),
        ({"guidance": False}, [(8, False), (4, True)]),
        ({"flow_rows": "coin"}, [(8, False), (16, False), (8, True)]),
        ({"flow_fraction": 1.0}, [(8, False), (8, False)]),
    ],
)
def test_a_step_runs_as_few_forwards_as_the_mathematics_allows(changes, calls):
    """All rows, guidance as one batch, then the tangent of the rest."""
    cfg, net = settings(**changes), Curved()
    jax.eval_shape(lambda: rectified.loss(net, batch(), draws(cfg), cfg))
    assert net.calls == calls
