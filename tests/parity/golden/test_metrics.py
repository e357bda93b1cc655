"""The fixture of the quality measures, another of its form, and mistakes that it must see."""

import json

import numpy as np
import pytest

from meanflow.metrics import scores
from meanflow.metrics.moments import Moments
from parity import check
from parity.golden import fixtures
from parity.golden import metrics as golden_metrics

GOLDEN = check.GOLDEN / "metrics.npz"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(fixtures.SYSTEMS, "metrics", golden_metrics)


def failures(path=GOLDEN):
    """Run all cases of a fixture; return those with a failed check, and the results that no check looked at."""
    fixture, plan = fixtures.Fixture(path), fixtures.Plan([], {}, [])
    fixtures.plan_fixture(fixture, fixtures.SYSTEMS[fixture.system], plan)
    checks = [one for case in plan.cases for one in check.run_case(case)]
    unseen = set(fixture.results()) - fixture.used
    return {one.case.removeprefix(f"golden/{path.stem}/") for one in checks if not one.ok}, unseen


def changed(tmp_path, **arrays):
    """Return the path of a copy of the fixture with other arrays; `__` in a name stands for a slash."""
    with np.load(GOLDEN) as file:
        given = {key: file[key] for key in file.files}
    np.savez(tmp_path / "metrics.npz", **given | {key.replace("__", "/"): array for key, array in arrays.items()})
    return tmp_path / "metrics.npz"


def test_the_fixture():
    assert failures() == (set(), set())


def test_every_result_is_compared(tmp_path):
    """Each one, moved by a little, fails its case."""
    with np.load(GOLDEN) as file:
        results = {key: file[key] for key in file.files if key.startswith("out/")}
    for key, value in results.items():
        in_float32 = key in ("out/kid/full", "out/kid/torch_fidelity")
        path = changed(tmp_path, **{key: value * (1 + (1e-4 if in_float32 else 1e-5))})
        assert failures(path)[0] == {fixtures.group_of(key)}, key


def test_unknown_results_are_not_covered(tmp_path):
    """Of a case that there is, and of none."""
    path = changed(tmp_path, out__fid__other=np.array(1.0), out__lpips__alex=np.array(1.0))
    result = check.run(tmp_path, "metrics")
    assert path.exists() and not result.ok and all(one.ok for one in result.checks)
    assert sorted(result.not_covered) == ["golden/metrics/out/fid/other", "golden/metrics/out/lpips/alex"]


def test_missing_results_fail(tmp_path):
    with np.load(GOLDEN) as file:
        np.savez(tmp_path / "metrics.npz", **{key: file[key] for key in file.files if key != "out/fid/dmf"})
    assert failures(tmp_path / "metrics.npz")[0] == {"fid"}


def test_another_fixture_of_the_same_form(tmp_path):
    """Of other sizes and settings; the results are our own, so that only what the runner takes from the file counts."""
    rng = np.random.default_rng(0)
    f1, f2, small = (rng.standard_normal((num, 9)).astype(np.float32) for num in (40, 61, 5))
    logits = rng.standard_normal((47, 6)).astype(np.float32)
    arrays = {"in/f1": f1, "in/f2": f2, "in/f1_small": small, "in/logits": logits}
    for name, rows in (("fid", f1), ("fid_small", small)):
        arrays |= {f"out/{name}/{key}": scores.frechet_distance(rows, f2) for key in golden_metrics.FRECHET}
    arrays["out/is/torch_fidelity"] = scores.inception_score(logits, 4)
    arrays["out/is/torch_fidelity_1split"] = scores.inception_score(logits, 1, shuffle=False)[:1]
    arrays["out/is/imf"] = scores.inception_score(logits, 4, "official_jax")
    arrays["out/kid/torch_fidelity"] = scores.kernel_distance(f1, f2, 3, 20)
    whole = scores.kernel_distance(f1, f2[:40], 1, 40)[:1]
    arrays |= {"out/kid/full": whole, "out/kid/full_f64": whole}
    arrays["out/prc/torch_fidelity"] = scores.precision_recall(f1, f2, 2)
    for i, rows in ((1, f1), (2, f2)):
        arrays |= {f"out/mu{i}": rows.mean(axis=0, dtype=np.float64), f"out/sigma{i}": np.cov(rows, rowvar=False)}
    config = {"system": "metrics", "is_splits": 4, "kid": {"subsets": 3, "subset_size": 20}, "prc_k": 2}
    np.savez(tmp_path / "other.npz", config=json.dumps(config), **arrays)
    assert failures(tmp_path / "other.npz") == (set(), set())


def biased_covariance(self):
    return self._products / self.count


def biased_mmd(x, y):
    return scores._kernel(x, x).mean() + scores._kernel(y, y).mean() - 2 * scores._kernel(x, y).mean()


def trace_of_root_of_products(root_a, root_b):
    """Of the wrong matrices: R R^T, not R^T R."""
    size = min(len(root_a), len(root_b))
    return np.linalg.svd(root_a[:size].T @ root_b[:size], compute_uv=False).sum()


def second_set_first(a, b, *args):
    return KERNEL_DISTANCE(b, a, *args)


def exchanged(generated, real, *args):
    return PRECISION_RECALL(real, generated, *args)


def without_order(logits, splits=10, convention="torch_fidelity", shuffle=True):
    return INCEPTION_SCORE(logits, splits, convention, False)


KERNEL_DISTANCE, PRECISION_RECALL = scores.kernel_distance, scores.precision_recall
INCEPTION_SCORE = scores.inception_score
RADII = scores._squared_radii
REMAINDER_KEPT = scores.IS_CONVENTIONS | {"official_jax": (scores._score_with_offset, scores._even_splits)}
REMAINDER_DROPPED = scores.IS_CONVENTIONS | {"torch_fidelity": (scores._score, scores._whole_splits)}
MISTAKES = {
    "covariance over n": (Moments, "covariance", property(biased_covariance), {"sigma1", "sigma2", "fid", "fid_small"}),
    "roots transposed": (scores, "_trace_of_root", trace_of_root_of_products, {"fid", "fid_small"}),
    "kernel distance biased": (scores, "_squared_mmd", biased_mmd, {"kid"}),
    "kernel of degree 2": (scores, "_kernel", lambda x, y: (x @ y.T / x.shape[1] + 1) ** 2, {"kid"}),
    "kernel not scaled": (scores, "_kernel", lambda x, y: (x @ y.T + 1) ** 3, {"kid"}),
    "subset of the second set first": (scores, "kernel_distance", second_set_first, {"kid"}),
    "another seed": (scores.kernel_distance, "__defaults__", (100, 1000, 0), {"kid"}),
    "k + 1 neighbours": (scores, "_squared_radii", lambda rows, k, size: RADII(rows, k + 1, size), {"prc"}),
    "k - 1 neighbours": (scores, "_squared_radii", lambda rows, k, size: RADII(rows, k - 1, size), {"prc"}),
    "sets exchanged": (scores, "precision_recall", exchanged, {"prc"}),
    "rows in their own order": (scores, "inception_score", without_order, {"is"}),
    "order of another seed": (scores, "SEED", 2019, {"is"}),
    "remainder kept": (scores, "IS_CONVENTIONS", REMAINDER_KEPT, {"is"}),
    "remainder dropped": (scores, "IS_CONVENTIONS", REMAINDER_DROPPED, {"is"}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(monkeypatch, mistake):
    owner, name, wrong, cases = MISTAKES[mistake]
    monkeypatch.setattr(owner, name, wrong)
    assert failures()[0] == cases
