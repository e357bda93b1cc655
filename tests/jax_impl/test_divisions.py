"""A step is the step of the whole batch, into however many micro-batches that is divided, for every method."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_impl import measures, step
from meanflow.config import division
from meanflow.data import draws

COIN = {"method.flow_rows": "coin", "method.flow_fraction": 0.6, "method.time_order": "truncated"}
FRONT = {"method.label_drop": "front", "method.label_drop_prob": 0.4}
# What each method adds to its tiny network: rows of a kind are in unequal parts of the batch wherever they can be.
# `test_devices.py` divides the others, which take long to compile.
SETTINGS = {
    "meanflow_coin": (None, COIN | FRONT),
    "improved_front": ("tiny_improved", {"method.flow_rows": "front"} | FRONT),
    "flow": ("tiny_flow", {"model.repa_dims": (5, 3), "model.repa_depth": 1, "model.projector_dim": 6} | FRONT),
}  # fmt: skip


@pytest.fixture(autouse=True)
def float64(optimize_less):
    """Draw and compare in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=[s if s == "meanflow_coin" else pytest.param(s, marks=pytest.mark.slow) for s in SETTINGS])
def config(request, tiny):
    """Return the config of a setting, in float64, which clips nothing."""
    network, changes = SETTINGS[request.param]
    changes = {"model.compute_dtype": "float64", "train.clip_norm": 0.0} | changes
    return tiny((request.getfixturevalue(network) if network else {}) | changes)


def rows_of(config):
    """Return a batch with all that the methods read."""
    rng = np.random.RandomState(0)
    tokens = (config.model.input_size // config.model.patch_size) ** 2
    more = {"features": rng.randn(16, tokens, sum(config.model.repa_dims))} if config.method.name == "flow" else {}
    return {"image": rng.randn(16, 8, 8, 1), "label": rng.randint(0, 10, 16)} | more | draws.of_process(config, 0)


def taken(config, accumulate):
    """Return {name: array}: the gradients of a step from random weights, its EMA, and its metrics."""
    config.train.accumulate = accumulate
    division.check(config, 1, "devices")
    mesh, rng = step.make_mesh(config), np.random.RandomState(1)
    graphdef, fresh = step.build_net(config)
    params = jax.tree.map(lambda a: jnp.asarray(0.3 * rng.randn(*a.shape)), fresh)
    _, state = step.create_state(config, mesh, params)
    state, metrics = step.make_train_step(config, graphdef, mesh)(state, step.put_batch(rows_of(config), mesh))
    trees = {"grad": optax.tree.get(state.opt_state, "mu"), "ema": state.emas[0]}
    leaves, _ = jax.tree_util.tree_flatten_with_path(trees)
    return {jax.tree_util.keystr(path): a for path, a in leaves} | metrics


def test_micro_batches_take_the_step_of_the_batch(config):
    whole = taken(config, 1)
    assert whole["grad_norm"] > 1e-3 and whole.get("du_dt_norm", 1) > 1e-3
    parts = taken(config, 4)
    assert parts.keys() == whole.keys()
    for name, a in whole.items():
        np.testing.assert_allclose(parts[name], a, rtol=1e-9, atol=1e-12, err_msg=name)


def test_means_over_rows_of_a_kind_are_over_the_rows_of_all_parts():
    t, r = jnp.array([0.5] * 4), jnp.array([0.5, 0.1, 0.2, 0.3])
    err, du_dt = jnp.array([1.0, 2.0, 3.0, 7.0]), jnp.ones((4, 2, 2, 1))
    aux = {"t": t, "r": r, "err": err, "du_dt": du_dt * jnp.arange(4).reshape(4, 1, 1, 1)}
    parts = [measures.measure(jnp.array(0.0), {name: a[i : i + 2] for name, a in aux.items()}) for i in (0, 2)]
    means = measures.of_kinds(jax.tree.map(lambda a, b: (a + b) / 2, *parts))
    assert jax.tree.map(float, means) == pytest.approx(
        {"loss": 0, "raw_error": 3.25, "raw_error_flow_rows": 1, "raw_error_jvp_rows": 4, "du_dt_norm": 4}
    )


def test_no_rows_of_a_kind_have_a_mean_of_0():
    aux = {"t": jnp.ones(2), "r": jnp.ones(2), "err": jnp.ones(2), "du_dt": jnp.zeros((2, 2, 2, 1))}
    means = measures.of_kinds(measures.measure(jnp.array(0.0), aux))
    assert (means["raw_error_flow_rows"], means["raw_error_jvp_rows"], means["du_dt_norm"]) == (1, 0, 0)
