"""A JVP that reads the outputs of affine layers from the forward, and blocks that are computed twice."""

import concurrent.futures
import itertools
import threading
from types import SimpleNamespace

import make_draws
import numpy as np
import pytest
import tiny
import torch
from torch import nn

from meanflow.config import checks
from meanflow.data import draws
from torch_impl import step
from torch_impl.methods import METHODS, common
from torch_impl.models.layers import Linear
from torch_impl.models.tape import name_layers, under_jvp

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
    if config.model.name == "unet":
        masks = net.dropout_masks(torch.from_numpy(rng.uniform(size=num)))
        given |= {"dropout": masks, "augment": torch.ones(num, 6, dtype=torch.float64)}
    return z, v, t, r, torch.arange(num) % 10, given


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_tangent_is_that_of_the_whole_network(name, remat):
    config, net = build(name, **{"train.remat": remat})
    rows = common.Rows(groups=2, flow=3, jvp=1)
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


def grads_of(config, net, backend=None):
    """Return the gradients of the loss of a batch and the bytes kept for the backward pass."""
    rng, c = np.random.default_rng(2), config.model
    method, shape = METHODS[config.method.name], (8, c.channels, c.input_size, c.input_size)
    batch = {name: torch.from_numpy(rng.standard_normal(shape)) for name in ("image", "noise")}
    batch |= {"label": torch.arange(8) % 10, "augment": torch.from_numpy(rng.standard_normal((8, 6)))}
    draws = make_draws.in_torch(config.method, shape, 0)
    loss = step.Loss(net, method, (SimpleNamespace(**config.method),))
    if backend:
        torch._dynamo.reset()  # else it counts how often each module is compiled
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


@pytest.mark.parametrize(
    ("name", "remat"),
    [("dit", True), *(pytest.param(name, False, marks=() if name == "dit" else pytest.mark.slow) for name in NETWORKS)],
)
def test_a_compiled_step_has_the_same_gradients(name, remat):
    expected, _ = grads_of(*build(name))
    compiled, _ = grads_of(*build(name, **{"train.remat": remat}), backend="aot_eager")
    torch.testing.assert_close(compiled, expected, rtol=1e-9, atol=1e-11)


def test_a_compiled_block_keeps_its_products_alone(monkeypatch):
    """Kept are the results of two linear layers of four: what the others give is read once more, and so are norms."""
    _, kept = grads_of(*build("dit", **{"model.depth": 2}), backend="aot_eager_decomp_partition")
    monkeypatch.setattr("torch_impl.models.tape.KEPT", [])
    _, nothing = grads_of(*build("dit", **{"model.depth": 2}), backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    _, everything = grads_of(*build("dit", **{"model.depth": 2}), backend="aot_eager_decomp_partition")
    assert nothing < kept < 0.8 * everything, (nothing, kept, everything)


def peak_of_a_step(remat):
    """Return the most bytes that a compiled step has allocated at once, beside its state."""
    sizes = {"model.depth": 5, "model.width": 32, "train.batch_size": 16, "train.remat": remat, "train.compile": True}
    config, _ = build("dit", **sizes, **{"method.flow_fraction": 1.0, "method.guidance": False})
    state = step.create_state(config, None, torch.device("cpu"))
    shape = (16, config.model.input_size, config.model.input_size, config.model.channels)
    batch = {"image": np.zeros(shape), "label": np.zeros(16, np.int32)} | draws.of_process(config, 0)
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


class Sum(nn.Module):
    """u = t z + the sum of sin(layer(k z)) over the layers that a pass calls, k = 1, 2, ... for each layer's calls.

    forward, jvp: names of the layers, `a` and `b`, in call order.  teacher: a network that the forward alone calls too.
    """

    takes_tape = True

    def __init__(self, forward="ab", jvp=None, teacher=None, meet=None, named=True):
        super().__init__()
        self.plans, self.teacher, self.meet = (forward, jvp or forward), teacher, meet
        generator = torch.Generator().manual_seed(0)
        for name in "ab":
            self.add_module(name, Linear(3, 3, dtype=None).double())
            getattr(self, name).weight.data.normal_(generator=generator)
        if named:
            name_layers(self)

    def forward(self, z, t, r, y, tape=None):
        u, calls = z * t[:, None], dict.fromkeys("ab", 0)
        for name in self.plans[under_jvp(tape)]:
            calls[name] += 1
            u = u + torch.sin(getattr(self, name)(calls[name] * z, tape))
            if self.teacher is not None and not under_jvp(tape):
                self.teacher(z, t, r, y)
            if self.meet is not None:
                self.meet.wait(60)
        return u


TWO_ROWS = common.Rows(groups=2, flow=1, jvp=1)


def some_rows(seed=0):
    """Return states, tangents, times t and r, and labels of four rows."""
    rng = np.random.default_rng(seed)
    z, v = (torch.from_numpy(rng.standard_normal((4, 3))) for _ in range(2))
    t, r = (torch.from_numpy(a) for a in (rng.uniform(0.6, 0.9, 4), rng.uniform(0.1, 0.4, 4)))
    return z, v, t, r, torch.arange(4)


def derivative(net, rows, tape=None):
    """Return du/dt on the rows with r < t, as the methods compute it.  tape: another than the network's own."""
    z, v, t, r, y = rows
    own = common.average_velocity(net, z, t, r, y, {}, TWO_ROWS)[1]
    return common.total_derivative(net, z, v, t, r, y, {}, TWO_ROWS, tape or own)[1::2]


def plain(net, rows):
    """Return the same by a JVP of the whole network, which records nothing."""
    z, v, t, r, y = rows
    tangents = (v, torch.ones_like(t), torch.zeros_like(r))
    return torch.func.jvp(lambda z, t, r: net(z, t, r, y), (z, t, r), tangents)[1][1::2].detach()


@pytest.mark.parametrize(("forward", "jvp"), [("ab", "ab"), ("ab", "ba"), ("aab", "aba")])
def test_the_order_of_layers_does_not_matter(forward, jvp):
    net, rows = Sum(forward, jvp), some_rows()
    torch.testing.assert_close(derivative(net, rows), plain(net, rows), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("forward", "jvp", "message"),
    [
        ("ab", "a", "the JVP skipped layers that the tape recorded in the forward: b"),
        ("aab", "ab", "the JVP skipped layers that the tape recorded in the forward: a"),
        ("ab", "aba", "a runs in the JVP more often than in the forward that the tape recorded"),
        ("a", "ab", "b runs in the JVP more often than in the forward that the tape recorded"),
    ],
)
def test_a_jvp_of_other_layers_than_the_forward_is_an_error(forward, jvp, message):
    with pytest.raises(RuntimeError, match=message):
        derivative(Sum(forward, jvp), some_rows())


def test_a_tape_is_read_once():
    net, (z, v, t, r, y) = Sum(), some_rows()
    _, tape = common.average_velocity(net, z, t, r, y, {}, TWO_ROWS)
    common.total_derivative(net, z, v, t, r, y, {}, TWO_ROWS, tape)
    with pytest.raises(RuntimeError, match="a runs in the JVP more often"):
        common.total_derivative(net, z, v, t, r, y, {}, TWO_ROWS, tape)


def test_a_tape_of_other_inputs_is_an_error():
    net, (z, _, t, r, y) = Sum(), some_rows()
    _, tape = common.average_velocity(net, z.flip(0), t, r, y, {}, TWO_ROWS)
    with pytest.raises(RuntimeError, match="this tape was recorded at other inputs"):
        derivative(net, some_rows(), tape)


def test_outputs_of_another_shape_are_an_error():
    net, (z, v, t, r, y) = Sum(), some_rows()
    _, tape = common.average_velocity(net, z, t, r, y, {}, TWO_ROWS)
    tape.outputs["b"][0] = tape.outputs["b"][0][:1]
    with pytest.raises(RuntimeError, match=r"b returned \(1, 3\) .*in the forward, but \(2, 3\) in the JVP"):
        common.total_derivative(net, z, v, t, r, y, {}, TWO_ROWS, tape)


def test_a_layer_without_a_name_does_not_record():
    with pytest.raises(RuntimeError, match="no name: end the network's __init__ with name_layers"):
        derivative(Sum(named=False), some_rows())


def test_other_passes_between_forward_and_jvp_change_nothing():
    net, other, rows, others = Sum(), Sum("ba"), some_rows(0), some_rows(1)
    expected = plain(net, rows), plain(net, others), plain(other, rows)
    passes = ((net, rows), (net, others), (other, rows))
    tapes = [common.average_velocity(net, z, t, r, y, {}, TWO_ROWS)[1] for net, (z, _, t, r, y) in passes]
    for i in (1, 2, 0):
        net, (z, v, t, r, y) = passes[i]
        net(z, t, r, y)
        found = common.total_derivative(net, z, v, t, r, y, {}, TWO_ROWS, tapes[i])[1::2]
        torch.testing.assert_close(found, expected[i], rtol=1e-12, atol=1e-12)


def test_a_network_called_inside_another_records_nothing():
    net, rows = Sum(teacher=Sum()), some_rows()
    torch.testing.assert_close(derivative(net, rows), plain(net, rows), rtol=1e-12, atol=1e-12)


def test_forwards_in_two_threads_do_not_meet():
    """Forwards alone: forward-mode AD has one level for all threads of a process."""
    rows, meet = [some_rows(seed) for seed in range(2)], threading.Barrier(2)
    nets = [Sum(meet=meet), Sum("ba", meet=meet)]

    def forward(net, rows):
        z, _, t, r, y = rows
        return common.average_velocity(net, z, t, r, y, {}, TWO_ROWS)[1]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        tapes = list(pool.map(forward, nets, rows))
    for net, (z, v, t, r, y), tape in zip(nets, rows, tapes, strict=True):
        net.meet = None
        found = common.total_derivative(net, z, v, t, r, y, {}, TWO_ROWS, tape)[1::2]
        torch.testing.assert_close(found, plain(net, (z, v, t, r, y)), rtol=1e-12, atol=1e-12)


def test_a_network_that_takes_no_tape_has_a_plain_jvp():
    net, rows = Sum(), some_rows()
    foreign = lambda *inputs: net(*inputs)  # noqa: E731
    torch.testing.assert_close(derivative(foreign, rows), plain(net, rows), rtol=1e-12, atol=1e-12)
