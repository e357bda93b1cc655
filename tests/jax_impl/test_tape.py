"""A JVP that reads the outputs of affine layers from the forward, and blocks that are computed twice."""

import concurrent.futures
import threading

import jax
import jax.numpy as jnp
import make_draws
import numpy as np
import pytest
import tiny
from flax import nnx

from jax_impl import step
from jax_impl.methods import METHODS, common
from jax_impl.models import dit
from jax_impl.models.layers import Linear
from jax_impl.models.tape import name_layers, under_jvp
from meanflow.config import checks
from meanflow.data import draws

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
COMPILED = ["dit", *(pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS if name != "dit")]


@pytest.fixture(autouse=True)
def float64():
    """Compute in float64."""
    with jax.enable_x64(True):
        yield


def build(name, **options):
    """Return the config, the network's graph definition and random weights."""
    config = tiny.compose({"model.name": name, "model.compute_dtype": "float64"} | NETWORKS[name] | options)
    graphdef, params = step.build_net(checks.check(config))
    rng = np.random.default_rng(0)
    return config, graphdef, jax.tree.map(lambda a: jnp.asarray(0.3 * rng.standard_normal(a.shape)), params)


def rows_of(config, net, num=8):
    """Return states, tangents, times t and r, labels, and what else the network is given, of `num` rows."""
    rng = np.random.default_rng(1)
    shape = (num, config.model.input_size, config.model.input_size, config.model.channels)
    z, v = (jnp.asarray(rng.standard_normal(shape)) for _ in range(2))
    t, r = (jnp.asarray(a) for a in (rng.uniform(0.6, 0.9, num), rng.uniform(0.1, 0.4, num)))
    given = {name: jnp.asarray(rng.uniform(1, 2, num)) for name in ("omega", "t_min", "t_max")}
    given = given if config.model.name == "imf_dit" else {}
    if config.model.name == "unet":
        given |= {"dropout": net.dropout_masks(jnp.asarray(rng.uniform(size=num))), "augment": jnp.ones((num, 6))}
    return z, v, t, r, jnp.arange(num) % 10, given


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_the_tangent_is_that_of_the_whole_network(name, remat):
    config, graphdef, params = build(name, **{"train.remat": remat})
    net, rows = nnx.merge(graphdef, params), common.Rows(groups=2, flow=3, jvp=1)
    z, v, t, r, y, given = rows_of(config, net)

    @jax.jit
    def both(z, v, t, r):
        u, taped = common.average_velocity(net, z, t, r, y, given, rows)
        expected = jax.jvp(lambda z, t, r: net(z, t, r, y, **given), (z, t, r), (v, t * 0 + 1, r * 0))
        return (u, common.total_derivative(net, z, v, t, r, y, given, rows, taped)), expected

    (u, du_dt), (expected, slope) = both(z, v, t, r)
    np.testing.assert_allclose(u, expected, rtol=1e-10, atol=1e-12)
    rest = np.arange(8) % 4 == 3
    np.testing.assert_allclose(du_dt[rest], slope[rest], rtol=1e-10, atol=1e-12)
    assert float(jnp.abs(slope[rest]).max()) > 1e-3 and not du_dt[~rest].any()


def loss_of(config, graphdef, params):
    """Return the loss of a batch as a function of the parameters."""
    rng, c = np.random.default_rng(2), config.model
    method, shape = METHODS[config.method.name], (8, c.input_size, c.input_size, c.channels)
    batch = {name: jnp.asarray(rng.standard_normal(shape)) for name in ("image", "noise")}
    batch |= {"label": jnp.arange(8) % 10, "augment": jnp.asarray(rng.standard_normal((8, 6)))}
    draws = make_draws.in_jax(config.method, shape, 0)
    return jax.jit(jax.grad(lambda params: method.loss(nnx.merge(graphdef, params), batch, draws, config.method)[0]))


@pytest.mark.parametrize("name", COMPILED)
def test_rematerialised_blocks_have_the_same_gradients(name):
    plain, again = (build(name, **{"train.remat": remat}) for remat in (False, True))
    text, grads = [], []
    for config, graphdef, params in (plain, again):
        grad = loss_of(config, graphdef, params)
        text.append(str(jax.make_jaxpr(grad)(params)))
        grads.append(jax.tree.leaves(grad(params)))
    assert "policy=<function keeps" in text[0] and "policy=None" in text[1] and "policy=<function" not in text[1]
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def kept_by(block, x, c):
    """Return the sizes of the activations that a block keeps for the gradient of its parameters and x, but for x."""
    graphdef, params = nnx.split(block)
    _, gradient = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x, c), params, x)
    given = [a.shape for a in (*jax.tree.leaves(params), x, c)]
    return sorted(a.size for a in jax.tree.leaves(gradient) if a.shape not in given and a.ndim)


def test_a_block_keeps_its_products_alone(monkeypatch):
    """Six modulations, the MLP's hidden units, queries, keys and values, the scores, and what they weigh and give."""
    num, tokens, width, heads = 3, 16, 32, 2
    options = {"qk_norm": False, "kernels": ("plain", "plain"), "dtype": jnp.float32}
    block, x, c = dit.Block(width, heads, 4.0, **options), jnp.ones((num, tokens, width)), jnp.ones((num, width))
    rows = num * tokens
    expected = [6 * width * num, 4 * width * rows, 3 * width * rows, heads * tokens * rows, *[width * rows] * 3]
    assert kept_by(block, x, c) == sorted(expected)
    monkeypatch.setattr("jax_impl.models.tape.keeps", lambda *_, **__: True)
    assert sum(kept_by(block, x, c)) > 2 * sum(expected)


def planned(config):
    """Return the bytes of temporary memory that XLA plans for a training step."""
    mesh = step.make_mesh(config)
    graphdef, state = step.create_state(config, mesh)
    shape = (config.train.batch_size, config.model.input_size, config.model.input_size, config.model.channels)
    batch = {"image": np.zeros(shape), "label": np.zeros(shape[0], np.int32)} | draws.of_process(config, 0)
    compiled = step.make_train_step(config, graphdef, mesh).lower(state, step.put_batch(batch, mesh)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_a_step_with_rematerialised_blocks_needs_less_memory(monkeypatch):
    sizes = {"model.depth": 4, "model.width": 64, "train.batch_size": 32}
    (plain, _, _), (again, _, _) = (build("dit", **sizes, **{"train.remat": remat}) for remat in (False, True))
    needs = planned(plain)
    assert planned(again) < 0.6 * needs
    monkeypatch.setattr(step, "KEEP_BARRIERS", None)
    assert planned(again) > 0.9 * needs  # what XLA makes of it by itself


class Sum(nnx.Module):
    """u = t z + the sum of sin(layer(k z)) over the layers that a pass calls, k = 1, 2, ... for each layer's calls.

    forward, jvp: names of the layers, `a` and `b`, in call order.  teacher: a network that the forward alone calls too.
    """

    takes_tape = True

    def __init__(self, forward="ab", jvp=None, teacher=None, meet=None, named=True):
        self.plans, self.teacher, self.meet = (forward, jvp or forward), teacher, meet
        rng = np.random.default_rng(2)
        for name in "ab":
            setattr(self, name, Linear(3, 3, dtype=None))
            getattr(self, name).kernel[...] = jnp.asarray(rng.standard_normal((3, 3)))
        if named:
            name_layers(self)

    def __call__(self, z, t, r, y, tape=None):
        u, calls = z * t[:, None], dict.fromkeys("ab", 0)
        for name in self.plans[under_jvp(tape)]:
            calls[name] += 1
            u = u + jnp.sin(getattr(self, name)(calls[name] * z, tape))
            if self.teacher is not None and not under_jvp(tape):
                self.teacher(z, t, r, y)
            if self.meet is not None:
                self.meet.wait(60)
        return u


TWO_ROWS = common.Rows(groups=2, flow=1, jvp=1)


def some_rows(seed=0):
    """Return states, tangents, times t and r, and labels of four rows."""
    rng = np.random.default_rng(seed)
    z, v = (jnp.asarray(rng.standard_normal((4, 3))) for _ in range(2))
    t, r = (jnp.asarray(a) for a in (rng.uniform(0.6, 0.9, 4), rng.uniform(0.1, 0.4, 4)))
    return z, v, t, r, jnp.arange(4)


def derivative(net, rows, tape=None):
    """Return du/dt on the rows with r < t, as the methods compute it.  tape: another than the network's own."""
    z, v, t, r, y = rows
    own = common.average_velocity(net, z, t, r, y, {}, TWO_ROWS)[1]
    return common.total_derivative(net, z, v, t, r, y, {}, TWO_ROWS, tape or own)[1::2]


def plain(net, rows):
    """Return the same by a JVP of the whole network, which records nothing."""
    z, v, t, r, y = rows
    tangents = (v, jnp.ones_like(t), jnp.zeros_like(r))
    return jax.jvp(lambda z, t, r: net(z, t, r, y), (z, t, r), tangents)[1][1::2]


@pytest.mark.parametrize(("forward", "jvp"), [("ab", "ab"), ("ab", "ba"), ("aab", "aba")])
def test_the_order_of_layers_does_not_matter(forward, jvp):
    net, rows = Sum(forward, jvp), some_rows()
    np.testing.assert_allclose(derivative(net, rows), plain(net, rows), rtol=1e-12, atol=1e-12)


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
    _, tape = common.average_velocity(net, z[::-1], t, r, y, {}, TWO_ROWS)
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
        np.testing.assert_allclose(found, expected[i], rtol=1e-12, atol=1e-12)


def test_a_network_called_inside_another_records_nothing():
    net, rows = Sum(teacher=Sum()), some_rows()
    np.testing.assert_allclose(derivative(net, rows), plain(net, rows), rtol=1e-12, atol=1e-12)


def test_forwards_in_two_threads_do_not_meet():
    rows, meet = [some_rows(seed) for seed in range(2)], threading.Barrier(2)
    nets = [Sum(meet=meet), Sum("ba", meet=meet)]

    def forward(net, rows):
        z, _, t, r, y = rows
        return common.average_velocity(net, z, t, r, y, {}, TWO_ROWS)[1]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        tapes = list(pool.map(jax.enable_x64(True)(forward), nets, rows))
    for net, (z, v, t, r, y), tape in zip(nets, rows, tapes, strict=True):
        net.meet = None
        found = common.total_derivative(net, z, v, t, r, y, {}, TWO_ROWS, tape)[1::2]
        np.testing.assert_allclose(found, plain(net, (z, v, t, r, y)), rtol=1e-12, atol=1e-12)


def test_a_network_that_takes_no_tape_has_a_plain_jvp():
    net, rows = Sum(), some_rows()
    foreign = lambda *inputs: net(*inputs)  # noqa: E731
    np.testing.assert_allclose(derivative(foreign, rows), plain(net, rows), rtol=1e-12, atol=1e-12)
