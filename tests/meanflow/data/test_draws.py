"""Draws of training: functions of seed, step, row and name alone, with the distributions that methods expect."""

import numpy as np
import pytest
from scipy import stats

from jax_impl import methods as jax_methods
from meanflow.config import options
from meanflow.data import draws
from torch_impl import methods as torch_methods

NETWORKS = {"meanflow": "dit", "improved": "imf_dit", "flow": "dit", "decoupled": "dmf_dit", "rectified": "edm2"}
SHAPE = 16, 4, 4, 3


def settings(method="meanflow", **changes):
    """Return the options of a method."""
    config = options.get_config(NETWORKS[method], method)
    config.method.update(changes)
    return config.method


def equal(one, other):
    """Assert that two dicts of arrays are the same, bit for bit."""
    assert one.keys() == other.keys()
    for name, a in one.items():
        assert a.dtype == np.float32 == other[name].dtype
        np.testing.assert_array_equal(a, other[name], err_msg=name)


@pytest.mark.parametrize("method", draws.METHODS)
def test_both_frameworks_have_the_same_draws(method):
    names = tuple(draws.METHODS[method])
    assert names == jax_methods.METHODS[method].Draws._fields == torch_methods.METHODS[method].Draws._fields
    assert draws.METHODS.keys() == jax_methods.METHODS.keys() == torch_methods.METHODS.keys()
    for name, a in draws.draw(settings(method), SHAPE).items():
        assert a.shape[0] == 16 and (a.shape == SHAPE) == name.startswith("noise")


@pytest.mark.parametrize("method", draws.METHODS)
@pytest.mark.parametrize("rows", ["coin", "front"])
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_parts_of_a_batch_are_those_of_the_whole(method, rows, num_processes):
    config = options.get_config(NETWORKS[method], method)
    config.train.batch_size, config.model.input_size, config.seed = 16, 4, 2**32 - 1
    config.method.update({name: rows for name in ("flow_rows", "label_drop") if name in config.method})
    parts = [draws.of_process(config, 7, (p, num_processes)) for p in range(num_processes)]
    whole = draws.of_process(config, 7)
    equal({name: np.concatenate([part[name] for part in parts]) for name in whole}, whole)
    data, drawn = draws.split({"image": None} | whole)
    assert data == {"image": None} and drawn.keys() == draws.METHODS[method].keys()


@pytest.mark.parametrize("method", draws.METHODS)
def test_a_row_does_not_depend_on_the_batch_size(method):
    cfg = settings(method)
    few, many = draws.draw(cfg, (3, *SHAPE[1:])), draws.draw(cfg, SHAPE)
    equal(few, {name: a[:3] for name, a in many.items()})


@pytest.mark.parametrize("method", draws.METHODS)
def test_every_seed_step_row_and_name_has_its_own(method):
    """No two rows of any of them share a number; a row's times and coins have 24 bits, so not all can differ."""
    cfg = settings(method)
    found = [draws.draw(cfg, SHAPE, seed, step) for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1))]
    columns = [a.reshape(16, -1)[:, 0] for drawn in found for a in drawn.values()]
    assert len(np.unique(columns)) == np.size(columns)
    for name, kind in draws.METHODS[method].items():
        if kind == draws.IMAGE:
            assert len(np.unique([drawn[name] for drawn in found])) > 0.999 * 4 * np.prod(SHAPE)
    equal(draws.draw(cfg, SHAPE, 1, 1), found[-1])


@pytest.mark.parametrize("method", draws.METHODS)
@pytest.mark.parametrize("sampler", ["normal", "uniform"])
def test_distributions(method, sampler):
    cfg = settings(method, **({"time_sampler": "uniform"} if sampler == "uniform" else {}))
    many = draws.draw(cfg, (20_000, 1, 1, 1), seed=3)
    for name, kind in draws.METHODS[method].items():
        normal = kind.distribution == "normal" or (kind.distribution == "time" and sampler == "normal")
        p = stats.kstest(many[name].ravel(), "norm" if normal else "uniform").pvalue
        assert p > 1e-3, (name, p)
        assert normal or (many[name].min() >= 0 and many[name].max() < 1)


def test_noise_is_that_of_no_sample():
    """Samples use the same seeds."""
    from meanflow.sampling import noise

    samples = noise.draw(range(16), SHAPE[1:], 10, 0)[0]
    assert not np.isin(samples, draws.draw(settings(), SHAPE)["noise"]).any()


def test_front_rows():
    cfg = settings(flow_rows="front", flow_fraction=0.3, label_drop="front", label_drop_prob=0.25)
    found = draws.draw(cfg, (20, 1, 1, 1))
    plain = draws.draw(settings(), (20, 1, 1, 1))
    assert found["coin"].tolist() == [0] * 6 + [1] * 14
    assert found["drop"].tolist() == sorted(plain["drop"])


def test_an_offset_that_is_wrong_is_seen(monkeypatch):
    """A mutation: each process takes the first rows."""
    right = draws.draw
    monkeypatch.setattr(draws, "draw", lambda cfg, shape, seed, step, rows: right(cfg, shape, seed, step, slice(8)))
    with pytest.raises(AssertionError):
        test_parts_of_a_batch_are_those_of_the_whole("meanflow", "coin", 2)
