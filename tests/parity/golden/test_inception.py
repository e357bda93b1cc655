"""Mistakes in Inception, or in what it is given, are seen by the golden runner."""

import functools

import pytest

from jax_impl.models import inception as jax_inception
from meanflow.metrics import preprocessing
from parity import check
from parity.adapters import frozen_networks
from parity.golden import inception as golden_inception
from torch_impl.models import inception as torch_inception

INCEPTION = {"jax": jax_inception, "torch": torch_inception}


def failures(only):
    """Return {(group, framework, quantity)} of the checks that fail."""
    checks = check.run(check.GOLDEN, f"golden/inception_fid/({only})$").checks
    return {(c.case.split("/")[-1], c.framework, c.quantity) for c in checks if not c.ok}


@pytest.fixture(params=["jax", "torch"])
def framework(request, monkeypatch):
    """Which implementation has the mistake; the other one is not run."""
    monkeypatch.setattr(frozen_networks, "INCEPTION", {request.param: INCEPTION[request.param]})
    return request.param


def test_average_that_counts_the_padding(framework, monkeypatch):
    pool = INCEPTION[framework].POOLS["average"]

    def counting(x):
        return pool(x) * _share(1 + 0 * x, framework)

    monkeypatch.setitem(INCEPTION[framework].POOLS, "average", counting)
    assert failures("pytorch_fid") == {("pytorch_fid", framework, "2048")}


def _share(ones, framework):
    """Return which share of 3 x 3 pixels lies within the image."""
    if framework == "torch":
        return torch_inception.F.avg_pool2d(ones, 3, stride=1, padding=1)
    lax = jax_inception.jax.lax
    return lax.reduce_window(ones, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME") / 9


def test_average_in_place_of_the_last_maximum(framework, monkeypatch):
    pools = INCEPTION[framework].POOLS
    monkeypatch.setitem(pools, "maximum", pools["average"])
    assert failures("pytorch_fid") == {("pytorch_fid", framework, "2048")}


def test_bias_kept(framework, monkeypatch):
    call = "__call__" if framework == "jax" else "forward"
    original = getattr(INCEPTION[framework].Logits, call)

    @functools.wraps(original)
    def kept(self, x):
        logits, _ = original(self, x)
        return logits, logits

    monkeypatch.setattr(INCEPTION[framework].Logits, call, kept)
    assert failures("imf_jax") == {("imf_jax", framework, "logits")}


def test_half_pixels_in_place_of_tf1(monkeypatch):
    right = preprocessing.CONVENTIONS["torch_fidelity"]
    monkeypatch.setitem(preprocessing.CONVENTIONS, "torch_fidelity", right._replace(resize="half_pixel"))
    failed = failures("resize_.*")
    assert failed == {("resize_tf1", f, image) for f in INCEPTION for image in ("img", "img2")}


def test_another_range(monkeypatch):
    right = preprocessing.CONVENTIONS["pytorch_fid"]
    monkeypatch.setitem(preprocessing.CONVENTIONS, "pytorch_fid", right._replace(half_range=128.0))
    assert {group for group, _, _ in failures("resize_.*")} == {"resize_pytorchfid"}


def test_an_output_that_is_not_known_is_a_failure(framework, monkeypatch):
    monkeypatch.setattr(golden_inception, "JAX_OUTPUTS", {"pooled": "2048"})
    assert failures("imf_jax") == {("imf_jax", framework, "logits (no such output is known)")}
