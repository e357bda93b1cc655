"""The fit of two time embeddings by least squares, and the command around it without a network."""

import itertools

import numpy as np
import pytest
import tiny
import torch

from configs import digits
from meanflow.commands import time_embedding
from meanflow.config import checks, options, store
from meanflow.errors import UserError
from meanflow.weights import files, reading
from parity import check
from parity.golden import fixtures
from torch_impl.time_embedding import error as torch_error

NUM = 6  # Fourier features


def problem(n, d, num=50, seed=0):
    """Return X [num n], of columns of very different lengths, and Y [num d]."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num, n)) * 10.0 ** -np.arange(n), rng.normal(size=(num, d)) * 3


def solved(x, y):
    return time_embedding.unit_least_squares(x.T @ x, x.T @ y)


def squares(x, w, y):
    """Return |X w - Y|^2 of each column."""
    return np.square(x @ w - y).sum(0)


def test_unit_least_squares_in_the_plane_by_brute_force():
    x, y = problem(2, 5)
    angles = np.linspace(0, 2 * np.pi, 100_001)
    circle = np.stack([np.cos(angles), np.sin(angles)])
    found = solved(x, y)
    for column in range(5):
        best = circle[:, squares(x, circle, y[:, column : column + 1]).argmin()]
        np.testing.assert_allclose(found[:, column], best, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_unit_least_squares_are_stationary_and_below_all_else_of_length_1(scale):
    """(gram + l) w = moment, with no eigenvalue of gram + l below 0: that is the least of all."""
    x, y = problem(4, 7)
    w = solved(x, scale * y)
    np.testing.assert_allclose(np.linalg.norm(w, axis=0), 1, rtol=1e-12)
    gram, moment = x.T @ x, scale * x.T @ y
    shift = ((moment - gram @ w) * w).sum(0)
    np.testing.assert_allclose(gram @ w + shift * w, moment, rtol=0, atol=1e-9 * abs(moment).max())
    assert (shift > -np.linalg.eigvalsh(gram)[0]).all()
    others = np.random.default_rng(1).normal(size=(4, 10_000))
    others /= np.linalg.norm(others, axis=0)
    for column in range(7):
        assert squares(x, w, scale * y)[column] <= squares(x, others, scale * y[:, [column]]).min() + 1e-9 * scale**2


def test_what_lies_within_reach_is_found():
    x, _ = problem(3, 1)
    w = np.array([[0.6], [0.0], [-0.8]])
    np.testing.assert_allclose(solved(x, x @ w), w, atol=1e-8)


def test_a_direction_that_tells_nothing_takes_up_the_length():
    """Of a length of 0.5 wanted, the rest goes where it changes nothing."""
    gram, moment = np.diag([1.0, 1e-12]), np.array([[0.5], [0.0]])
    moment[1] = 1e-14
    w = time_embedding.unit_least_squares(gram, moment)
    np.testing.assert_allclose(w[:, 0], [0.5, 0.75**0.5], rtol=1e-5)


@pytest.fixture(scope="module")
def teacher():
    """Return weights of a teacher: what the fit uses, and others."""
    rng = np.random.default_rng(0)
    shapes = {
        "unet.emb_fourier.freqs": (NUM,), "unet.emb_fourier.phases": (NUM,), "unet.emb_noise.weight": (9, NUM),
        "unet.emb_label.weight": (9, 3), "logvar_fourier.freqs": (4,), "logvar_linear.weight": (1, 4),
    }  # fmt: skip
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return weights | {"unet.emb_fourier.freqs": weights["unet.emb_fourier.freqs"] * 3}


def mean_squared_error(teacher, of_t, of_r, t, r):
    """Return that of embeddings, in their own units, by the network's formula without its epsilon."""
    freqs, phases = (np.float64(teacher[f"unet.emb_fourier.{name}"]) for name in ("freqs", "phases"))

    def embed(weight, a):
        weight = np.float64(weight) / np.linalg.norm(np.float64(weight), axis=1, keepdims=True)
        return 2**0.5 * np.cos(np.outer(a, freqs) + phases) @ weight.T

    target = embed(teacher[time_embedding.ONE], np.log(np.float64(t) / (1 - np.float64(t))) / 4)
    return np.square((embed(of_t, t) + embed(of_r, r)) / 2**0.5 - target).mean()


@pytest.fixture(scope="module")
def fitted(teacher):
    """Return the times of a fit, and its weights."""
    times = time_embedding.draw_times(np.random.default_rng(1), 3000)
    fourier = (teacher[f"unet.emb_fourier.{name}"] for name in ("freqs", "phases"))
    return times, time_embedding.fit_embeddings(*fourier, teacher[time_embedding.ONE], *times)


def test_an_exact_fit_has_fresh_weights_magnitude(fitted):
    for weight in fitted[1]:
        assert weight.shape == (9, NUM) and weight.dtype == np.float32
        np.testing.assert_allclose(np.square(weight).mean(1), 1, rtol=1e-5)


def test_an_exact_fit_cannot_be_bettered(teacher, fitted):
    """By weights nearby, by any that are drawn, or by copies of the teacher's, with which it starts."""
    times, (of_t, of_r) = fitted
    error, rng = mean_squared_error(teacher, of_t, of_r, *times), np.random.default_rng(2)
    one = teacher[time_embedding.ONE]
    assert error < 0.8 * mean_squared_error(teacher, one, one, *times)
    for _ in range(100):
        assert error < mean_squared_error(teacher, *rng.normal(size=(2, 9, NUM)), *times)
        near = (a + 1e-2 * rng.normal(size=a.shape) for a in (of_t, of_r))
        assert error < mean_squared_error(teacher, *near, *times)


def test_more_rounds_never_raise_the_error(teacher, fitted, monkeypatch):
    fourier = [teacher[f"unet.emb_fourier.{name}"] for name in ("freqs", "phases")]
    errors = []
    for rounds in (1, 2, 4, 8, 50):
        monkeypatch.setattr(time_embedding, "ROUNDS", rounds)
        weights = time_embedding.fit_embeddings(*fourier, teacher[time_embedding.ONE], *fitted[0])
        errors.append(mean_squared_error(teacher, *weights, *fitted[0]))
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_times_are_in_order_and_in_bounds():
    t, r = time_embedding.draw_times(np.random.default_rng(0), 5000)
    assert t.dtype == r.dtype == np.float32 and t.shape == r.shape == (5000,)
    assert (t >= r).all() and r.min() == np.float32(1 / 501) and t.max() == np.float32(80 / 81)
    assert t.mean() == pytest.approx(2 / 3, abs=0.02) and r.mean() == pytest.approx(1 / 3, abs=0.02)


def test_the_config_of_two_times_is_the_teacher_s_but_for_its_embeddings():
    teacher = digits.get_config("edm2_flow")
    teacher.model.logvar_channels = 16
    before = store.flatten(teacher)
    config = checks.check(time_embedding.two_times(teacher))
    assert (config.method.name, config.method.time_sampler) == ("rectified", "re2_truncate")
    differing = {key for key, value in store.flatten(config.model).items() if value != teacher.model[key]}
    assert differing == {"interval_embedder", "logvar_channels"}
    assert config.model.interval_embedder and config.model.logvar_channels == 0
    assert store.flatten(teacher) == before
    checks.check_trainable(config)


def test_only_edm2_has_embeddings_to_fit():
    config = options.get_config("dit", "flow")
    with pytest.raises(UserError, match="--teacher has config.model.name dit: only edm2 has a time embedding to fit"):
        time_embedding.two_times(config)


@pytest.fixture
def command(parse_flags, monkeypatch, teacher):
    """Return a function (*argv) that runs the command without networks and returns what it saved and measured."""

    def run(*argv, changes=()):
        network, method, _ = tiny.split({"model.name": "edm2", "method.name": "flow"} | dict(changes))
        config = tiny.make(network, method)
        monkeypatch.setattr(time_embedding, "config_flag", lambda: config)
        monkeypatch.setattr("sys.argv", ["program", *argv])
        parse_flags(time_embedding.define_flags, "--teacher=a.safetensors", "--output=b.safetensors", *argv)
        heard = {"errors": []}

        def save(path, weights, metadata):
            heard.update(path=path, saved=weights, metadata=metadata)

        def error(config, weights, teacher_config, given, t, r):
            assert config.model.interval_embedder and not teacher_config.model.interval_embedder
            heard["errors"].append((weights, t))
            return 0.25

        def network(source, config, choice):
            return reading.Network(config, dict(teacher), "weights", False)

        monkeypatch.setattr(reading, "network", network)
        monkeypatch.setattr(time_embedding.files, "load", lambda path: heard["saved"])  # what was written is read again
        time_embedding.time_embedding(lambda config: None, lambda *_: None, save, error)
        return heard

    return run


def test_the_command_fits_and_measures_at_other_times(command, teacher, monkeypatch, capsys):
    monkeypatch.setattr(time_embedding, "NUM_TIMES", 500)
    heard = command("--seed=3")
    saved, two = heard["saved"], set(time_embedding.TWO)
    assert saved.keys() == two | {name for name in teacher if name != time_embedding.ONE and "logvar" not in name}
    assert all(np.array_equal(saved[name], teacher[name]) for name in saved.keys() - two)
    times = time_embedding.draw_times(np.random.default_rng(3), 500)
    fourier = (teacher[f"unet.emb_fourier.{name}"] for name in ("freqs", "phases"))
    for name, expected in zip(
        time_embedding.TWO, time_embedding.fit_embeddings(*fourier, teacher[time_embedding.ONE], *times), strict=True
    ):
        np.testing.assert_array_equal(saved[name], expected)
    (after, t), (before, _) = heard["errors"]
    assert after is saved and not np.array_equal(t, times[0])  # the error is of times that the fit has not seen
    assert all(np.array_equal(before[name], teacher[time_embedding.ONE]) for name in two)
    assert heard["path"] == "b.safetensors" and heard["metadata"]["format"] == "canonical"
    assert capsys.readouterr().out == "b.safetensors: error 0.2500\n"


@pytest.mark.parametrize(
    ("argv", "changes", "words"),
    [
        (["--output=b.npz"], {}, "--output is 'b.npz'; name the .safetensors to write"),
        (["--output="], {}, "--output is ''"),
        ([], {"method.name": "rectified"}, "--teacher a.safetensors has config.method.name rectified"),
        ([], {"model.name": "dit"}, "--teacher has config.model.name dit: only edm2 has a time embedding to fit"),
    ],
)  # fmt: skip
def test_what_the_command_refuses(command, argv, changes, words):
    with pytest.raises(UserError, match=words):
        command(*argv, changes=changes)


def test_an_official_teacher_needs_no_config(parse_flags, monkeypatch, tmp_path, capsys):
    """EDM2's network as it is published; its log-variance is left out, and what is written is a start for two times."""
    weights = fixtures.Fixture(check.GOLDEN / "edm2_reflow_torch.npz").under("param/")
    torch.save({"net": {n: torch.from_numpy(np.array(a)) for n, a in weights.items()}}, tmp_path / "net.pt")
    monkeypatch.setattr(time_embedding, "NUM_TIMES", 50)
    monkeypatch.setattr(time_embedding, "config_flag", lambda: None)
    parse_flags(
        time_embedding.define_flags, f"--teacher={tmp_path / 'net.pt'}", f"--output={tmp_path / 'start.safetensors'}"
    )
    time_embedding.time_embedding(lambda config: None, lambda *_: None, files.save, torch_error)
    assert 0 < float(capsys.readouterr().out.split()[-1]) < 4
    written = files.load(tmp_path / "start.safetensors")
    kept = {n for n in weights if n != time_embedding.ONE and not n.startswith("logvar_")}
    assert written.keys() == kept | set(time_embedding.TWO)
    assert all(np.array_equal(written[name], weights[name]) for name in kept)
