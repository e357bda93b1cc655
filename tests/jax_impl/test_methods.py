"""What MeanFlow's parts promise, beyond what the parity suite compares."""

import jax.numpy as jnp
import make_draws
import numpy as np
import pytest

from jax_impl.methods import common, meanflow
from jax_impl.models.tape import under_jvp
from meanflow.config import options

pytestmark = pytest.mark.usefixtures("optimize_less")


def settings(**changes):
    cfg = options.get_config().method
    cfg.update(changes)
    return cfg


def draws(batch_size, cfg, seed=0):
    return make_draws.in_jax(cfg, (batch_size, 4, 4, 1), seed)


@pytest.mark.parametrize("sampler", ["logit_normal", "uniform"])
@pytest.mark.parametrize("flow_rows", ["split", "front", "coin"])
def test_times_are_ordered_and_the_share_of_flow_rows_is_met(sampler, flow_rows):
    cfg = settings(time_sampler=sampler, flow_rows=flow_rows, flow_fraction=0.25)
    t, r = common.sample_times(draws(4000, cfg), cfg)
    assert bool((r <= t).all() and (r >= 0).all() and (t <= 1).all())
    share = float((r == t).mean())
    assert share == pytest.approx(0.25, abs=0.03 if flow_rows == "coin" else 0)


def test_a_draw_is_a_function_of_its_key():
    cfg = settings()
    first, same, other = (draws(8, cfg, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


class Constant:
    """A network whose velocity is its label, so that guidance can be computed by hand."""

    takes_tape = True

    num_classes, dropout, augment_dim = 9, 0.0, 0

    def __init__(self):
        self.calls = 0

    def __call__(self, z, t, r, y, tape=None):
        self.calls += 0 if under_jvp(tape) else len(y)  # a JVP takes its primal from the forward
        return jnp.broadcast_to(y.astype(z.dtype)[:, None, None, None], z.shape)


def test_a_step_runs_as_few_rows_as_it_says():
    for kappa, expected in ((0.0, 2), (0.5, 2.25)):  # in batches; the JVP's tangent is not a call
        cfg, net = settings(kappa=kappa, omega=0.3), Constant()
        batch = {"image": jnp.zeros((16, 4, 4, 1)), "label": jnp.zeros(16, jnp.int32)}
        meanflow.loss(net, batch, draws(16, cfg), cfg)
        assert net.calls == expected * 16
