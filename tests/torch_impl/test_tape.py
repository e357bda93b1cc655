"""A tangent that takes the outputs of affine layers from the forward, and blocks that are computed twice."""

import functools
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from meanflow.config import checks
from torch_impl import step
from torch_impl.methods import METHODS, common
from torch_impl.models import tape

TRANSFORMER = {"model.depth": 2, "model.width": 16, "model.num_heads": 2}
NETWORKS = {
    "dit": {"method.name": "meanflow"} | TRANSFORMER,
    "imf_dit": {"method.name": "improved", "model.head_depth": 1} | TRANSFORMER,
    "dmf_dit": {"method.name": "decoupled", "model.dmf_depth": 1} | TRANSFORMER,
    "unet": {
        "method.guidance": False, "sample.cfg_scale": 1.0, "evaluation.classifier": False, "model.width": 16,
        "model.dropout": 0.2, "model.augment_dim": 6, "model.attn_resolutions": (4,), "model.num_blocks": 1,
    },
    "edm2": {
        "method.name": "rectified", "model.width": 16, "model.attn_resolutions": (4,), "model.num_blocks": 1,
    },
}  # fmt: skip


def build(name, **options):
    """Return the config and the network with random weights."""
    config = tiny.compose({"model.name": name, "model.compute_dtype": "float64"} | NETWORKS[name] | options)
    net, key = step.build_net(checks.check(config)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=key, dtype=torch.float64))
    return config, net


def rows_of(config, net, num=8):
    """Return states, tangents, times t and r, labels, and what else the network is given, of `num` rows."""
    rng = np.random.default_rng(1)
    shape = (num, config.model.channels, config.model.input_size, config.model.input_size)
    z, v = (torch.from_numpy(rng.standard_normal(shape)) for _ in range(2))
    t, r = (torch.from_numpy(a) for a in (rng.uniform(0.6, 0.9, num), rng.uniform(0.1, 0.4, num)))
    given = {name: torch.from_numpy(rng.uniform(1, 2, num)) for name in ("omega", "t_min", "t_max")}
    given = given if config.model.name == "imf_dit" else {}
    if net.dropout:
        masks = net.dropout_masks(torch.from_numpy(rng.uniform(size=num)))
        given |= {"dropout": masks, "augment": torch.ones(num, 6, dtype=torch.float64)}
    return z, v, t, r, torch.arange(num) % 10, given


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_tangent_is_that_of_the_whole_network(name, remat):
    config, net = build(name, **{"train.remat": remat})
    rows = common.Rows(groups=2, flow=3, rest=1)
    z, v, t, r, y, given = rows_of(config, net)
    u, taped = common.average_velocity(net, z, t, r, y, given, rows)
    du_dt = common.total_derivative(net, z, v, t, r, y, given, rows, taped)
    with torch.no_grad():
        tangents = (v, torch.ones_like(t), torch.zeros_like(r))
        expected, slope = torch.func.jvp(lambda z, t, r: net(z, t, r, y, **given), (z, t, r), tangents)
    torch.testing.assert_close(u.detach(), expected, rtol=1e-10, atol=1e-12)
    rest = torch.arange(8) % 4 == 3
    torch.testing.assert_close(du_dt[rest], slope[rest], rtol=1e-10, atol=1e-12)
    assert u.requires_grad and not du_dt.requires_grad
    assert float(slope[rest].abs().max()) > 1e-3 and not du_dt[~rest].any()


def test_a_tape_of_other_rows_gives_another_tangent():
    config, net = build("dit")
    rows = common.Rows(groups=2, flow=3, rest=1)
    z, v, t, r, y, given = rows_of(config, net)
    _, taped = common.average_velocity(net, z, t, r, y, given, rows)
    _, wrong = common.average_velocity(net, z.flip(0), t, r, y, given, rows)
    right, other = (common.total_derivative(net, z, v, t, r, y, given, rows, a) for a in (taped, wrong))
    assert float((right - other).abs().max()) > 1e-3


def grads_of(config, net, backend=None):
    """Return the gradients of the loss of a batch and the bytes kept for the backward pass."""
    rng, c = np.random.default_rng(2), config.model
    method, shape = METHODS[config.method.name], (8, c.channels, c.input_size, c.input_size)
    batch = {name: torch.from_numpy(rng.standard_normal(shape)) for name in ("image", "noise")}
    batch |= {"label": torch.arange(8) % 10, "augment": torch.from_numpy(rng.standard_normal((8, 6)))}
    draws = method.draw(torch.Generator().manual_seed(0), shape, config.method)
    loss = step.Loss(net, method, (SimpleNamespace(**config.method),))
    if backend:
        config.train.compile_backend = backend
        loss = step.wrap(loss, config, None)
    kept = {}

    def keep(a):
        kept[a.untyped_storage().data_ptr()] = a.untyped_storage().nbytes()
        return a

    net.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda a: a):
        value, _ = loss(batch, draws._replace(**{n: a.double() for n, a in draws._asdict().items()}))
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    value.backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return grads, sum(size for where, size in kept.items() if where not in own)


@pytest.mark.parametrize("name", NETWORKS)
def test_rematerialised_blocks_have_the_same_gradients_and_keep_less(name):
    deeper = {"model.depth": 4} if "model.depth" in NETWORKS[name] else {}
    (plain, kept), (again, kept_again) = (
        grads_of(*build(name, **deeper, **{"train.remat": remat})) for remat in (False, True)
    )
    torch.testing.assert_close(again, plain, rtol=1e-9, atol=1e-11)
    assert kept_again < 0.7 * kept, (kept_again, kept)


def test_a_compiled_step_with_rematerialised_blocks_has_the_same_gradients():
    expected, _ = grads_of(*build("dit"))
    compiled, _ = grads_of(*build("dit", **{"train.remat": True}), backend="aot_eager")
    torch.testing.assert_close(compiled, expected, rtol=1e-9, atol=1e-11)


def peak_of_a_step(remat):
    """Return the most bytes that a compiled step has allocated at once, beside its state."""
    sizes = {"model.depth": 5, "model.width": 32, "train.batch_size": 16, "train.remat": remat, "train.compile": True}
    config, _ = build("dit", **sizes, **{"method.flow_fraction": 1.0, "method.guidance": False})
    state = step.create_state(config, None, torch.device("cpu"))
    shape = (16, config.model.input_size, config.model.input_size, config.model.channels)
    batch = {"image": np.zeros(shape), "label": np.zeros(16, np.int32)}
    batch, run = step.put_batch(batch, torch.device("cpu")), step.make_train_step(config)
    state, _ = run(state, batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run(state, batch)
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))


@pytest.mark.slow
def test_a_compiled_step_with_rematerialised_blocks_needs_less_memory():
    """The compiler is free to compute all blocks again first, and does so if what one needs early another ends with."""
    plain, again = peak_of_a_step(False), peak_of_a_step(True)
    assert again < 0.6 * plain, (plain, again)


def test_no_tape_is_left_when_a_forward_fails():
    config, net = build("dit")
    z, _, t, r, y, given = rows_of(config, net)
    with pytest.raises(TypeError):
        common.average_velocity(functools.partial(net, unknown=1), z, t, r, y, given, common.Rows(1, 0, 8))
    assert tape.active() is None
