"""Reference statistics in all their formats, and files that are none."""

import collections
import os
import pickle

import numpy as np
import pytest

from meanflow.errors import UserError
from meanflow.metrics import references
from meanflow.metrics.references import Reference


def statistics(num_features=3, seed=0):
    rows = np.random.default_rng(seed).standard_normal((20, num_features))
    return rows.mean(axis=0), np.cov(rows, rowvar=False)


@pytest.fixture
def mean():
    return statistics()[0]


@pytest.fixture
def covariance():
    return statistics()[1]


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("whole", [True, False])
def test_round_trip(tmp_path, mean, covariance, whole):
    features = np.random.default_rng(1).standard_normal((20, 3)).astype(np.float32)
    reference = Reference(mean, covariance, 20, features, "jax_meanflow") if whole else Reference(mean, covariance)
    references.write(tmp_path / "new" / "reference.npz", reference)
    for metric in ("fid", "kid", "pr"):
        got = references.read(tmp_path / "new" / "reference.npz", metric)
        assert_equal(got, reference)
        assert got.mean.dtype == got.covariance.dtype == np.float64
    assert os.listdir(tmp_path / "new") == ["reference.npz"]


def test_both_kinds_of_features_in_one_file(tmp_path, mean, covariance):
    """Those for FID lie where official code looks for them."""
    inception = Reference(mean, covariance, 20, None, "torch_fidelity")
    dino = Reference(*statistics(5, seed=2), 20)
    references.write(tmp_path / "both.npz", {"fid": inception, "fd_dinov2": dino})
    assert_equal(references.read(tmp_path / "both.npz"), inception)
    assert_equal(references.read(tmp_path / "both.npz", "fd_dinov2"), dino)
    assert np.load(tmp_path / "both.npz")["mu"].shape == (3,)
    references.write(tmp_path / "dino.npz", {"fd_dinov2": dino})
    with pytest.raises(UserError, match="neither mu and sigma .* it has fd_dinov2/convention, fd_dinov2/mu"):
        references.read(tmp_path / "dino.npz")


@pytest.mark.parametrize("names", [("mu", "sigma"), ("ref_mu", "ref_sigma")])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_npz_of_others(tmp_path, mean, covariance, names, dtype):
    """Under any suffix; float32 statistics are not quite symmetric after a sum on a GPU."""
    covariance = covariance.astype(dtype)
    covariance[0, 1] *= 1 + np.finfo(np.float32).eps
    np.savez(tmp_path / "a.npz", **dict(zip(names, (mean.astype(dtype), covariance), strict=True)), other=np.ones(2))
    os.rename(tmp_path / "a.npz", tmp_path / "a.stats")
    got = references.read(tmp_path / "a.stats")
    np.testing.assert_array_equal(got.covariance, covariance)
    assert got.covariance.dtype == np.float64
    assert got[2:] == (None, None, "", None)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("order", ["C", "F"])
def test_pickle_of_edm2(tmp_path, mean, covariance, protocol, order):
    dino = dict(zip(("mu", "sigma"), statistics(5), strict=True))
    features = np.arange(21, dtype=np.float32).reshape(7, 3)
    fid = collections.OrderedDict(
        mu=mean.astype(">f4"), sigma=covariance, num_samples=np.int64(7), features=np.asarray(features, order=order)
    )
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"fid": fid, "fd_dinov2": dino, "num_images": 7}, protocol))
    assert_equal(references.read(path), (mean.astype(np.float32), covariance, 7, features, "", None))
    assert_equal(references.read(path, "fd_dinov2")[:2], statistics(5))


def test_names_of_all_versions_of_numpy(tmp_path, mean, covariance):
    """numpy 1 wrote numpy.core where numpy 2 writes numpy._core."""
    content = pickle.dumps({"fid": {"mu": mean, "sigma": covariance}}, 2)
    assert b"numpy._core" in content
    (tmp_path / "a.pkl").write_bytes(content.replace(b"numpy._core", b"numpy.core"))
    assert_equal(references.read(tmp_path / "a.pkl")[:2], (mean, covariance))


def test_dicts_of_official_code(tmp_path, mean, covariance):
    """An instance of dnnlib.util.EasyDict, which is a dict, without that package."""
    entries = pickle.dumps({"mu": mean, "sigma": covariance}, 2)[2:-1]
    new, key, put = b"\x80\x02cdnnlib.util\nEasyDict\n)\x81", b"X\x03\x00\x00\x00fid", b"s."
    (tmp_path / "a.pkl").write_bytes(new + key + entries + put)
    assert_equal(references.read(tmp_path / "a.pkl")[:2], (mean, covariance))


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("place", ["whole", "metric", "value", "other"])
def test_nothing_is_executed(tmp_path, mean, covariance, place):
    evil, made = Evil(tmp_path / "made"), tmp_path / "made"
    whole = {
        "whole": evil,
        "metric": {"fid": evil},
        "value": {"fid": {"mu": evil, "sigma": covariance}},
        "other": {"fid": {"mu": mean, "sigma": covariance}, "other": evil},
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(whole[place]))
    with pytest.raises(UserError, match=r"a.pkl is refused: it calls 'posix.mkdir', which no array needs"):
        references.read(tmp_path / "a.pkl")
    assert not made.exists()


def test_objects_in_an_npz_are_not_read(tmp_path, covariance):
    np.savez(tmp_path / "a.npz", mu=np.array([Evil(tmp_path / "made")], object), sigma=covariance)
    with pytest.raises(UserError, match=r"cannot read .*a.npz as statistics in an .npz"):
        references.read(tmp_path / "a.npz")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"nonsense", b"PK\x03\x04 cut off", b"\x80\x04r\xff\xff\xff\x7f.", b"\x80\x04\x82\x01.", b"Pelsewhere\n.",
        pickle.dumps({"fid": {"mu": np.array([None]), "sigma": np.ones((1, 1))}}),
        pickle.dumps({"fid": {"mu": np.array(["a"]), "sigma": np.ones((1, 1))}}),
        pickle.dumps({"fid": {"mu": np.dtype("f4"), "sigma": np.ones((1, 1))}}),
        pickle.dumps({"fid": {"mu": np.ones(3), "sigma": np.ones((3, 3))}}).replace(b"f8", b"f9"),
    ],
)  # fmt: skip
def test_damaged(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*a as |a is refused: its opcode"):
        references.read(tmp_path / "a")


def test_memory_that_a_pickle_claims(tmp_path):
    """A memo of 2^31 entries would take 16 GiB."""
    (tmp_path / "a").write_bytes(b"\x80\x04]r\xff\xff\xff\x7f.")
    with pytest.raises(UserError, match="memo 2147483647 after 2 opcodes"):
        references.read(tmp_path / "a")


def test_cut_off(tmp_path, mean, covariance):
    """Of a few lengths of a good file of either format, only the whole one is read."""
    references.write(tmp_path / "a.npz", Reference(mean, covariance))
    npz, pickled = (tmp_path / "a.npz").read_bytes(), pickle.dumps({"fid": {"mu": mean, "sigma": covariance}})
    for content in (npz, pickled):
        for length in range(0, len(content) - 1, 37):
            (tmp_path / "b").write_bytes(content[:length])
            with pytest.raises(UserError, match="cannot read"):
                references.read(tmp_path / "b")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot read .*a.npz: No such file.*--make_reference"):
        references.read(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mu": None}, "neither mu and sigma nor ref_mu and ref_sigma; it has sigma"),
        ({"mu": np.zeros(4)}, r"mu \(4,\) and sigma \(3, 3\) must have the shapes"),
        ({"mu": np.zeros((1, 3))}, r"mu \(1, 3\)"),
        ({"sigma": np.zeros(3)}, r"sigma \(3,\)"),
        ({"mu": np.array([0, np.nan, 0])}, "mu has values that are not finite"),
        ({"sigma": np.full((3, 3), np.inf)}, "sigma has values that are not finite"),
        ({"sigma": np.arange(9.0).reshape(3, 3)}, "sigma is not symmetric"),
        ({"sigma": -np.eye(3)}, "negative variances"),
        ({"features": np.zeros((5, 4))}, r"features \(5, 4\) must be rows of 3"),
        ({"features": np.full((5, 3), np.nan)}, "features has values that are not finite"),
    ],
)
def test_arrays_that_are_no_statistics(tmp_path, mean, covariance, change, words):
    arrays = {"mu": mean, "sigma": covariance} | change
    np.savez(tmp_path / "a.npz", **{key: array for key, array in arrays.items() if array is not None})
    with pytest.raises(UserError, match=words):
        references.read(tmp_path / "a.npz")


def test_statistics_that_a_pickle_lacks(tmp_path, mean, covariance):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"fid": {"mu": mean, "sigma": covariance}}))
    with pytest.raises(UserError, match="has no statistics of fd_dinov2; it has fid"):
        references.read(tmp_path / "a.pkl", "fd_dinov2")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(mean))
    with pytest.raises(UserError, match="has no statistics of fid; it has none by name"):
        references.read(tmp_path / "a.pkl")


def test_unknown_metric(tmp_path):
    with pytest.raises(UserError, match="no reference statistics for 'is', only for fid, kid, pr, fd_dinov2"):
        references.read(tmp_path / "a.npz", "is")


def test_nothing_to_write(tmp_path):
    with pytest.raises(UserError, match="no statistics for .*a.npz: .* one of fid, kid, pr, fd_dinov2"):
        references.write(tmp_path / "a.npz", {})
    assert not os.listdir(tmp_path)


def test_nonsense_is_not_written(tmp_path, mean, covariance):
    references.write(tmp_path / "a.npz", Reference(mean, covariance))
    with pytest.raises(UserError, match="the fid reference to be written: sigma has values that are not finite"):
        references.write(tmp_path / "a.npz", Reference(mean, covariance * np.nan))
    assert_equal(references.read(tmp_path / "a.npz")[:2], (mean, covariance))
