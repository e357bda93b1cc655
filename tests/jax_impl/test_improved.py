"""What improved MeanFlow's parts promise, beyond what the parity suite compares."""

import jax
import jax.numpy as jnp
import make_draws
import numpy as np
import pytest

from jax_impl.methods import improved
from jax_impl.models.tape import under_jvp
from meanflow.config import options

pytestmark = pytest.mark.usefixtures("optimize_less")


def settings(**changes):
    cfg = options.get_config("imf_dit", "improved").method
    cfg.update({"flow_fraction": 0.5} | changes)
    return cfg


def draws(batch_size, cfg, seed=0):
    return make_draws.in_jax(cfg, (batch_size, 2, 2, 1), seed)


def test_a_draw_is_a_function_of_its_key_and_no_two_draws_are_the_same():
    cfg = settings(time_sampler="uniform")
    first, same, other = (draws(8, cfg, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    columns = [first.times[:, 0], first.times[:, 1], *first[2:]]
    assert len({tuple(np.asarray(a).tolist()) for a in columns}) == len(columns) == 7


class Told:
    """A network whose velocities say what it was told, so that guidance can be computed by hand."""

    takes_tape = True

    num_classes = 9

    def __init__(self):
        self.calls = []

    def __call__(self, z, t, r, y, omega, t_min, t_max, heads="u", tape=None):
        self.calls.append((len(z), heads, under_jvp(tape)))
        v = (y + omega / 10 + 100 * t_min + 1000 * (1 - t_max))[:, None, None, None] + z
        u = (t - r)[:, None, None, None] * z
        velocities = tuple({"u": u, "v": v}[head] for head in heads)
        return velocities if len(velocities) > 1 else velocities[0]


def batch_of(num):
    return {"image": jax.random.normal(jax.random.key(1), (num, 2, 2, 1)), "label": jnp.arange(num) % 9}


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({}, [(16, "uv", False), (16 + 8, "v", False), (8, "u", True)]),
        ({"flow_fraction": 0.75}, [(16, "uv", False), (16 + 4, "v", False), (4, "u", True)]),
        ({"flow_fraction": 1.0}, [(16, "uv", False), (16, "v", False)]),
        ({"flow_fraction": 0.0}, [(16, "uv", False), (32, "v", False), (16, "u", True)]),
        ({"flow_rows": "front"}, [(16, "uv", False), (32, "v", False), (16, "u", True)]),
        ({"guidance": False}, [(16, "uv", False), (8, "v", False), (8, "u", True)]),
        ({"guidance": False, "flow_fraction": 1.0}, [(16, "uv", False)]),
    ],
)
def test_a_step_runs_as_few_forwards_as_the_mathematics_allows(changes, calls):
    """All rows, all without a class and the rest with theirs, then the tangent of the rest."""
    cfg, net = settings(**changes), Told()
    improved.loss(net, batch_of(16), draws(16, cfg), cfg)
    assert net.calls == calls
