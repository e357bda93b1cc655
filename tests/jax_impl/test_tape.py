"""A tangent that takes the outputs of affine layers from the forward, and blocks that are computed twice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from jax_impl import step
from jax_impl.methods import METHODS, common
from jax_impl.models import tape
from meanflow.config import checks

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
    if net.dropout:
        given |= {"dropout": net.dropout_masks(jnp.asarray(rng.uniform(size=num))), "augment": jnp.ones((num, 6))}
    return z, v, t, r, jnp.arange(num) % 10, given


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_tangent_is_that_of_the_whole_network(name, remat):
    config, graphdef, params = build(name, **{"train.remat": remat})
    net, rows = nnx.merge(graphdef, params), common.Rows(groups=2, flow=3, rest=1)
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


def test_a_tape_of_other_rows_gives_another_tangent():
    config, graphdef, params = build("dit")
    net, rows = nnx.merge(graphdef, params), common.Rows(groups=2, flow=3, rest=1)
    z, v, t, r, y, given = rows_of(config, net)
    _, taped = common.average_velocity(net, z, t, r, y, given, rows)
    _, wrong = common.average_velocity(net, z[::-1], t, r, y, given, rows)
    right, other = (common.total_derivative(net, z, v, t, r, y, given, rows, a) for a in (taped, wrong))
    assert float(jnp.abs(right - other).max()) > 1e-3


def loss_of(config, graphdef, params):
    """Return the loss of a batch as a function of the parameters."""
    rng, c = np.random.default_rng(2), config.model
    method, shape = METHODS[config.method.name], (8, c.input_size, c.input_size, c.channels)
    batch = {name: jnp.asarray(rng.standard_normal(shape)) for name in ("image", "noise")}
    batch |= {"label": jnp.arange(8) % 10, "augment": jnp.asarray(rng.standard_normal((8, 6)))}
    draws = method.draw(jax.random.key(0), shape, config.method)
    return jax.jit(jax.grad(lambda params: method.loss(nnx.merge(graphdef, params), batch, draws, config.method)[0]))


@pytest.mark.parametrize("name", NETWORKS)
def test_rematerialised_blocks_have_the_same_gradients(name):
    plain, again = (build(name, **{"train.remat": remat}) for remat in (False, True))
    text, grads = [], []
    for config, graphdef, params in (plain, again):
        grad = loss_of(config, graphdef, params)
        text.append(str(jax.make_jaxpr(grad)(params)))
        grads.append(jax.tree.leaves(grad(params)))
    assert "remat" not in text[0] and "remat" in text[1]
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def planned(config):
    """Return the bytes of temporary memory that XLA plans for a training step."""
    mesh = step.make_mesh(config)
    graphdef, state = step.create_state(config, mesh)
    shape = (config.train.batch_size, config.model.input_size, config.model.input_size, config.model.channels)
    batch = {"image": np.zeros(shape), "label": np.zeros(shape[0], np.int32)}
    compiled = step.make_train_step(config, graphdef, mesh).lower(state, step.put_batch(batch, mesh)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_step_with_rematerialised_blocks_needs_less_memory(monkeypatch):
    sizes = {"model.depth": 4, "model.width": 64, "train.batch_size": 32}
    (plain, _, _), (again, _, _) = (build("dit", **sizes, **{"train.remat": remat}) for remat in (False, True))
    needs = planned(plain)
    assert planned(again) < 0.6 * needs
    monkeypatch.setattr(step, "KEEP_BARRIERS", None)
    assert planned(again) > 0.9 * needs  # what XLA makes of it by itself


def test_no_tape_is_left_when_a_forward_fails():
    config, graphdef, params = build("dit")
    net = nnx.merge(graphdef, params)
    z, _, t, r, y, given = rows_of(config, net)
    with pytest.raises(TypeError):
        common.average_velocity(functools.partial(net, unknown=1), z, t, r, y, given, common.Rows(1, 0, 8))
    assert tape.active() is None
