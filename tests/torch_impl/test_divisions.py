"""A step is the step of the whole batch, into however many micro-batches that is divided, for every method."""

import make_draws
import numpy as np
import pytest
import torch

from meanflow.config import division
from meanflow.data import draws
from torch_impl import measures, step
from torch_impl.methods import common

COIN = {"method.flow_rows": "coin", "method.flow_fraction": 0.6}
FRONT = {"method.label_drop": "front", "method.label_drop_prob": 0.4}
# What each method adds to its tiny network: rows of a kind are in unequal parts of the batch wherever they can be.
SETTINGS = {
    "meanflow": (None, {"method.flow_fraction": 0.75, "method.guidance_end": 0.7}),
    "meanflow_front": (None, {"method.flow_rows": "front"} | FRONT),
    "meanflow_coin": (None, COIN | FRONT | {"method.time_order": "truncated"}),
    "improved": ("tiny_improved", {"method.flow_fraction": 0.5}),
    "improved_front": ("tiny_improved", {"method.flow_rows": "front"} | FRONT),
    "decoupled": ("tiny_decoupled", {"method.guidance_end": 0.7, "method.time_order": "truncated"}),
    "flow": ("tiny_flow", {"model.repa_dims": (5, 3), "model.repa_depth": 1, "model.projector_dim": 6} | FRONT),
    "rectified": ("tiny_rectified", COIN | FRONT | {"method.distance_clip": 1.8, "method.stage1_steps": 0}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def float64():
    """Draw and compare in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=SETTINGS)
def config(request, tiny):
    """Return the config of a setting, in float64, which clips nothing."""
    network, changes = SETTINGS[request.param]
    changes = {"model.compute_dtype": "float64", "train.clip_norm": 0.0} | changes
    return tiny((request.getfixturevalue(network) if network else {}) | changes)


def rows_of(config):
    """Return a batch with all that the methods read."""
    rng = np.random.RandomState(0)
    images, noise = rng.randn(2, 16, 8, 8, 1)
    more = {"noise": noise} if config.method.name == "rectified" else {}
    if "repa_dims" in config.model:
        tokens = (config.model.input_size // config.model.patch_size) ** 2
        more["features"] = rng.randn(16, tokens, sum(config.model.repa_dims))
    return {"image": images, "label": rng.randint(0, 10, 16)} | more | draws.of_process(config, 0)


def taken(config, accumulate):
    """Return {name: array}: the gradients of a step from random weights, its EMA, and its metrics."""
    config.train.accumulate = accumulate
    division.check(config, 1, "devices")
    state, rng = step.create_state(config, None, torch.device("cpu")), np.random.RandomState(1)
    with torch.no_grad():
        for p in state.net.parameters():
            p.copy_(torch.from_numpy(0.3 * rng.randn(*p.shape)))
    batch = step.put_batch(rows_of(config), torch.device("cpu"))
    state, metrics = step.make_train_step(config)(state, batch)
    moments = {name: state.optimizer.state[p]["exp_avg"] for name, p in state.net.named_parameters()}
    found = {f"grad.{name}": a for name, a in moments.items()} | {f"ema.{n}": a for n, a in state.emas[0].items()}
    return {name: a.numpy() for name, a in found.items()} | step.reduce_metrics([metrics])[0]


def test_micro_batches_take_the_step_of_the_batch(config):
    whole = taken(config, 1)
    assert whole["grad_norm"] > 1e-3 and whole.get("du_dt_norm", 1) > 1e-3 and whole.get("kept", 0.5) not in (0, 1)
    for accumulate in (2, 4):
        parts = taken(config, accumulate)
        assert parts.keys() == whole.keys()
        for name, a in whole.items():
            np.testing.assert_allclose(parts[name], a, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("name", ["split", "front", "coin"])
def test_the_flow_rows_of_a_part_are_the_part_of_the_flow_rows(tiny, name, parts):
    c = tiny({"method.flow_rows": name, "method.label_drop": "front"}).method
    draws = make_draws.in_torch(c, (64, 1, 2, 2))
    pieces = [type(draws)(*rows) for rows in zip(*(a.chunk(parts) for a in draws), strict=True)]
    assert torch.equal(torch.cat([common.is_flow(piece, c) for piece in pieces]), common.is_flow(draws, c))
    labels = [common.drop_labels(torch.arange(64 // parts), piece, 99, c)[1] for piece in pieces]
    assert torch.equal(torch.cat(labels), common.drop_labels(torch.arange(64), draws, 99, c)[1])


def test_means_over_rows_of_a_kind_are_over_the_rows_of_all_parts():
    t, r = torch.tensor([0.5] * 4), torch.tensor([0.5, 0.1, 0.2, 0.3])
    err, du_dt = torch.tensor([1.0, 2.0, 3.0, 7.0]), torch.ones(4, 1, 2, 2)
    aux = {"t": t, "r": r, "err": err, "du_dt": du_dt * torch.arange(4).reshape(4, 1, 1, 1)}
    parts = [measures.measure(torch.tensor(0.0), {name: a[i : i + 2] for name, a in aux.items()}) for i in (0, 2)]
    means = measures.of_kinds({name: float(parts[0][name] + parts[1][name]) / 2 for name in parts[0]})
    assert means == pytest.approx(
        {"loss": 0, "raw_error": 3.25, "raw_error_flow_rows": 1, "raw_error_jvp_rows": 4, "du_dt_norm": 4}
    )


def test_no_rows_of_a_kind_have_a_mean_of_0():
    aux = {"t": torch.ones(2), "r": torch.ones(2), "err": torch.ones(2), "du_dt": torch.zeros(2, 1, 2, 2)}
    means = step.reduce_metrics([measures.measure(torch.tensor(0.0), aux)])[0]
    assert (means["raw_error_flow_rows"], means["raw_error_jvp_rows"], means["du_dt_norm"]) == (1, 0, 0)
