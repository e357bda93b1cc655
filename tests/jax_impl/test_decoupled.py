"""What decoupled MeanFlow's parts promise, beyond what the parity suite compares."""

import jax
import jax.numpy as jnp
import make_draws
import numpy as np
import pytest

from jax_impl.methods import decoupled
from jax_impl.models.tape import under_jvp
from meanflow.config import options

pytestmark = pytest.mark.usefixtures("optimize_less")


def settings(**changes):
    cfg = options.get_config("dmf_dit", "decoupled").method
    cfg.update({"omega": 0.5} | changes)
    return cfg


def draws(cfg, seed=0):
    return make_draws.in_jax(cfg, (8, 2, 2, 1), seed)


def batch():
    return {"image": jax.random.normal(jax.random.key(1), (8, 2, 2, 1)), "label": jnp.arange(8)}


def loss_of(net, batch, drawn, cfg, teacher=None):
    """Return the loss and aux, compiled."""
    return jax.jit(lambda batch, drawn: decoupled.loss(net, batch, drawn, cfg, teacher))(batch, drawn)


def wide(*rows):
    """Return arrays [b] as [b 1 1 1]."""
    return tuple(a.reshape(-1, 1, 1, 1) for a in rows)


class Curved:
    """A nonlinear network of everything it is told, with one parameter; remembers (rows, under a JVP) of its calls."""

    takes_tape = True

    num_classes = 9

    def __init__(self, parameter=1.0):
        self.parameter, self.calls = parameter, []

    def __call__(self, z, t, r, y, tape=None):
        self.calls.append((len(y), under_jvp(tape)))
        t, r, y = wide(t, r, y)
        return self.parameter * jnp.sin(z * (1 + y / 10) + t * t - r / 2)

    def log_variance(self, t, r):
        return self.parameter * (t + 2 * r)


def test_a_draw_is_a_function_of_its_key_and_no_two_draws_are_the_same():
    cfg = settings(time_sampler="uniform")
    first, same, other = (draws(cfg, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert not np.array_equal(first.noise, first.noise_flow)
    columns = [first.times[:, 0], first.times[:, 1], first.times_flow, first.drop]
    assert len({tuple(np.asarray(a).tolist()) for a in columns}) == 4


@pytest.mark.parametrize(
    ("guidance", "calls", "of_teacher"),
    [
        ("default", [(8, False), (8, False), (8, True)], []),
        ("mg", [(8, False), (8, False), (24, False), (8, True)], []),
        ("distill", [(8, False), (8, False), (8, True)], [(32, False)]),
    ],
)
def test_a_step_runs_as_few_forwards_as_the_mathematics_allows(guidance, calls, of_teacher):
    """Both terms, guidance as one batch, then the tangent of the MeanFlow term."""
    cfg, net, teacher = settings(guidance_type=guidance), Curved(), Curved()
    loss_of(net, batch(), draws(cfg), cfg, teacher)
    assert net.calls == calls and teacher.calls == of_teacher
