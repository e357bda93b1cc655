"""Features to metrics: the same from any batches and processes, and equal to the measures themselves."""

import numpy as np
import pytest
from absl import logging

from meanflow.errors import UserError
from meanflow.metrics import accumulate, scores
from meanflow.metrics.accumulate import Collector
from meanflow.metrics.references import Reference

NUM = 40
WIDTHS = {"pool": 12, "logits": 6, "dino": 5}


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((NUM, width)).astype(np.float32) for name, width in WIDTHS.items()}


@pytest.fixture
def references():
    rng = np.random.default_rng(1)
    pool, dino = rng.standard_normal((30, 12)) + 0.3, rng.standard_normal((30, 5))
    inception = Reference(pool.mean(axis=0), np.cov(pool, rowvar=False), 30, pool.astype(np.float32))
    return {
        **dict.fromkeys(("fid", "kid", "pr"), inception),
        "fd_dinov2": Reference(dino.mean(axis=0), np.cov(dino, rowvar=False)),
    }


@pytest.fixture
def warnings(monkeypatch):
    """Return the list of what is logged as a warning."""
    logged = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: logged.append(text % args))
    return logged


def collect(features, names=accumulate.METRICS, indices=range(NUM), size=7, keep=()):
    collector, indices = Collector(names, keep), np.array(indices, int)
    for start in range(0, len(indices), size):
        batch = indices[start : start + size]
        collector.add({name: rows[batch] for name, rows in features.items()}, batch)
    return collector


def test_needs():
    assert accumulate.needs(["fid", "kid", "pr"]) == {"pool"}
    assert accumulate.needs(("is",)) == {"logits"}
    assert accumulate.needs(accumulate.METRICS) == {"pool", "logits", "dino"}
    assert accumulate.needs(()) == set()
    with pytest.raises(UserError, match="fvd, lpips: unknown metric; choose from fid, is, kid, pr, fd_dinov2"):
        accumulate.needs(["lpips", "fid", "fvd"])
    with pytest.raises(UserError, match="lpips"):
        Collector(["lpips"])


def test_results_are_those_of_the_measures(features, references):
    got = accumulate.results(collect(features), references, "torch_fidelity")
    pool, real = features["pool"], references["fid"]
    score, kid = scores.inception_score(features["logits"]), scores.kernel_distance(pool, real.features, 100, 30)
    precision, recall, _ = scores.precision_recall(pool, real.features)
    dino = features["dino"].astype(np.float64)
    expected = {
        "fid": scores.frechet_distance_of(pool.mean(axis=0, dtype=float), np.cov(pool.T), *real[:2]),
        "inception_score": score[0], "inception_score_std": score[1], "kid": kid[0], "kid_std": kid[1],
        "precision": precision, "recall": recall,
        "fd_dinov2": scores.frechet_distance_of(dino.mean(axis=0), np.cov(dino.T), *references["fd_dinov2"][:2]),
    }  # fmt: skip
    assert list(got) == list(expected)
    assert got == pytest.approx(expected, rel=1e-6)
    assert all(type(value) is float for value in got.values())


@pytest.mark.parametrize("metric", accumulate.METRICS)
def test_only_what_is_asked_for(features, references, metric):
    """One metric needs its own features and references only, and its value is the same beside others."""
    name = accumulate.FEATURES[metric]
    alone = accumulate.results(
        collect({name: features[name]}, [metric]),
        {key: references[key] for key in references if key == metric},
        "torch_fidelity",
    )
    whole = accumulate.results(collect(features), references, "torch_fidelity")
    assert alone == {key: whole[key] for key in alone} and 0 < len(alone) < len(whole)


@pytest.mark.parametrize(
    ("convention", "how"),
    [("jax_meanflow", "official_jax"), ("torch_fidelity", "torch_fidelity"), ("pytorch_fid", "torch_fidelity")],
)
def test_convention_of_the_inception_score(features, convention, how):
    """33 rows are not a multiple of the splits."""
    got = accumulate.results(collect(features, ["is"], range(33)), {}, convention)
    values = {how: scores.inception_score(features["logits"][:33], convention=how) for how in scores.IS_CONVENTIONS}
    assert tuple(got.values()) == values[how]
    assert len(set(values.values())) == 2


@pytest.mark.parametrize("num_processes", [1, 2, 3, 50])
def test_any_number_of_processes(features, references, num_processes):
    """Samples are dealt out in turn; a process may have none.  Batches differ too."""
    parts = [
        collect(features, indices=range(process, NUM, num_processes), size=process + 1).to_bytes()
        for process in range(num_processes)
    ]
    merged = Collector.merge(parts[::-1], accumulate.METRICS)
    whole = collect(features)
    assert merged.count == whole.count == NUM
    for name in ("pool", "logits"):
        np.testing.assert_array_equal(merged.rows(name), features[name])
        np.testing.assert_array_equal(whole.rows(name), features[name])
    got, expected = (accumulate.results(one, references, "torch_fidelity") for one in (merged, whole))
    assert got == pytest.approx(expected, rel=1e-12)
    for name in ("inception_score", "kid", "precision", "recall"):
        assert got[name] == expected[name]
    again = Collector.merge([merged.to_bytes()], accumulate.METRICS)
    assert accumulate.results(again, references, "torch_fidelity") == got


def test_shuffled_samples_are_put_in_order(features):
    order = np.random.default_rng(2).permutation(NUM)
    np.testing.assert_array_equal(collect(features, indices=order).rows("logits"), features["logits"])


def test_rows_are_kept_only_where_needed(features):
    """50 000 rows of 2048 features are 400 MB: FID does without."""
    collector = collect(features, ["fid", "fd_dinov2", "is"])
    np.testing.assert_array_equal(collector.rows("logits"), features["logits"])
    assert collector.kept == {"logits"}
    with pytest.raises(KeyError):
        collector.rows("pool")
    kept = collect(features, ["fid"], keep=["pool"])
    np.testing.assert_array_equal(kept.rows("pool"), features["pool"])
    np.testing.assert_array_equal(Collector.merge([kept.to_bytes()], ["fid"]).rows("pool"), features["pool"])


def test_a_sample_that_is_counted_twice(features):
    parts = [collect(features, indices=range(10)).to_bytes(), collect(features, indices=range(8, 12)).to_bytes()]
    with pytest.raises(UserError, match="2 of 14 samples were counted twice"):
        Collector.merge(parts, accumulate.METRICS)


@pytest.mark.parametrize("name", WIDTHS)
def test_features_that_are_not_finite(features, name):
    features[name][3, 1] = np.nan
    collector = Collector(accumulate.METRICS)
    with pytest.raises(UserError, match=f"some {name} features are not finite: the model has diverged"):
        collector.add(features, np.arange(NUM))
    assert collector.count == 0


def test_features_that_do_not_fit(features):
    collector = Collector(["fid"])
    collector.add(features, np.arange(NUM))  # those of other metrics are not read
    for wrong in ({"logits": features["logits"]}, {"pool": features["pool"][1:]}, {"pool": features["pool"][:, 0]}):
        with pytest.raises(ValueError, match=f"expected {NUM} rows of pool features"):
            collector.add(wrong, np.arange(NUM))


def test_reference(features):
    """A set is at no distance from its own statistics; rows are in it if the metrics kept them."""
    collector = collect(features, ["fid", "kid", "pr", "fd_dinov2"], range(NUM)[::-1])
    reference = accumulate.to_reference(collector, "fid", "pytorch_fid")
    assert reference.num_samples == NUM and reference.convention == "pytorch_fid"
    np.testing.assert_array_equal(reference.features, features["pool"])
    got = accumulate.results(collect(features, ["fid", "pr"]), dict.fromkeys(("fid", "pr"), reference), "pytorch_fid")
    assert got == pytest.approx({"fid": 0, "precision": 1, "recall": 1}, abs=1e-10)
    assert accumulate.to_reference(collect(features, ["fid"]), "fid", "").features is None
    with pytest.raises(UserError, match="statistics of 1 samples"):
        accumulate.to_reference(collect(features, ["fid"], range(1)), "fid", "")


@pytest.mark.parametrize("metric", ["kid", "pr"])
def test_reference_without_features(features, references, metric):
    references = {metric: references[metric]._replace(features=None)}
    with pytest.raises(UserError, match=f"{metric} needs the features .* --make_reference and {metric} among"):
        accumulate.results(collect(features, [metric]), references, "torch_fidelity")


def test_reference_that_is_missing_or_of_another_network(features, references):
    collector = collect(features, ["fd_dinov2"])
    with pytest.raises(UserError, match="fd_dinov2 needs statistics of real images.*--make_reference"):
        accumulate.results(collector, {"fid": references["fid"]}, "torch_fidelity")
    with pytest.raises(UserError, match="fd_dinov2 have 12 features, but the images have 5 of dino"):
        accumulate.results(collector, {"fd_dinov2": references["fid"]}, "torch_fidelity")


def test_warnings_of_small_sets(features, references, warnings, monkeypatch):
    accumulate.results(collect(features), references, "torch_fidelity")
    bias, subsets = warnings
    assert "fid and fd_dinov2 of 40 samples is biased upwards" in bias
    assert "subsets of 30 samples instead of 1000" in subsets
    warnings.clear()
    monkeypatch.setattr(accumulate, "UNBIASED", NUM)
    monkeypatch.setattr(accumulate, "KID_SUBSET", 30)
    accumulate.results(collect(features), references, "torch_fidelity")
    accumulate.results(collect(features, ["is"], range(20)), references, "torch_fidelity")
    assert not warnings


def test_no_samples(references):
    """Also the error of a command that was to generate none."""
    empty = Collector.merge([Collector(accumulate.METRICS).to_bytes()], accumulate.METRICS)
    assert empty.count == 0 and empty.rows("logits").shape == (0, 0)
    for metric in accumulate.METRICS:
        with pytest.raises(UserError, match=r"statistics of 0 samples|logits, not \(0, 0\)"):
            accumulate.results(Collector([metric]), references, "torch_fidelity")
