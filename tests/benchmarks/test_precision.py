"""The study of precision, at tiny sizes: what it compares is what it says, in both frameworks."""

import contextlib
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import precision, precision_jax, precision_torch
from jax_impl.models.tape import Tape

FRAMEWORKS = {"jax": precision_jax, "torch": precision_torch}
COMPARED = {"jax": ("float32", "bfloat16"), "torch": tuple(precision.MODES)}  # JAX compiles slowly


def run(framework, mode, system="meanflow", **options):
    """Return what is compared, and the gradients, of a tiny network, without guidance: no tangent is then rounded."""
    module, config = FRAMEWORKS[framework], precision.make_config(system, "tiny")
    config.model.update({"depth": 1} if "depth" in config.model else {})
    config.method.guidance = False
    shapes, tables = module.shapes(config)
    weights = precision.random_weights(shapes, tables, precision.SYSTEMS[system][1], scale=1.0)
    options |= {"compiled": True} if framework == "jax" else {}
    aux, grads = module.make(config, mode, **options)(weights, *precision.random_batch(config, 4, seed=0))
    return precision.quantities_of(aux), grads


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Let PyTorch use one thread: tiny matrices gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runs(optimize_less):
    """Return {framework: {mode: (quantities, gradients)}}, float64 under None."""
    modes = {None: precision.REFERENCE} | precision.MODES
    return {name: {mode: run(name, modes[mode]) for mode in (None, *COMPARED[name])} for name in FRAMEWORKS}


@pytest.fixture(params=FRAMEWORKS)
def errors(request, runs):
    """Return {mode: {quantity: relative error}} of a framework."""
    values, grads = runs[request.param][None]
    found = {}
    for mode in COMPARED[request.param]:
        got, got_grads = runs[request.param][mode]
        found[mode] = {key: precision.relative_error(got[key], a) for key, a in values.items()}
        found[mode] |= precision.compare(got_grads, grads)[1]
    return found


def test_frameworks_agree_in_float64(runs):
    (values, grads), (torch_values, torch_grads) = runs["jax"][None], runs["torch"][None]
    assert grads.keys() == torch_grads.keys()
    for ours, theirs in ((values, torch_values), (grads, torch_grads)):
        assert all(a.any() and precision.relative_error(ours[name], a) < 1e-10 for name, a in theirs.items())


def test_float32_loses_little(errors):
    assert all(errors["float32"][name] < 1e-5 for name in ("u", "du_dt", "target", "gradient", "worst"))


def test_bfloat16_loses_what_its_bits_say(errors):
    for name in ("u", "du_dt", "target", "gradient"):
        assert 100 * errors["float32"][name] < errors["bfloat16"][name] < 0.1


@pytest.mark.parametrize("errors", ["torch"], indirect=True)
def test_mixed_keeps_the_tangent_in_float32_and_rounds_flow_rows(errors):
    for name in ("du_dt", "target"):
        assert errors["mixed"][name] < 2 * errors["float32"][name]
    assert errors["mixed"]["u"] > 100 * errors["float32"]["u"]


@pytest.mark.parametrize("errors", ["torch"], indirect=True)
def test_mixed_tangent_has_the_primal_of_bfloat16_and_the_tangent_of_float32(errors, runs):
    (values, _), (wanted, _) = runs["torch"]["mixed_tangent"], runs["torch"]["bfloat16"]
    assert precision.relative_error(values["u"], wanted["u"]) < 1e-6
    assert errors["mixed_tangent"]["du_dt"] < 2 * errors["float32"]["du_dt"]
    assert errors["mixed_tangent"]["gradient"] > 100 * errors["float32"]["gradient"]


@pytest.mark.parametrize("mode", ["mixed", "mixed_tangent"])
def test_mixed_modes_in_jax_call_the_network_of_each_data_type_where_they_say(mode):
    class Net(SimpleNamespace):
        def __call__(self, z, t, r, y, tape=None):
            return self.factor * z, self.factor * z

    sizes = {"num_classes": 1, "dropout": 0.0, "augment_dim": 0}
    nets = {"bfloat16": Net(factor=2.0, **sizes), "float32": Net(factor=3.0, **sizes)}
    net, z, t, r = precision_jax.Mixed(nets, precision.MODES[mode]), jnp.ones((2, 1, 1, 1)), jnp.ones(2), jnp.arange(2)
    tape = Tape(lambda a: a)
    tape.replay(())
    _, tangents = jax.jvp(lambda z: net(z, t, r, None, tape=tape), (z,), (z,))
    assert [a.ravel().tolist() for a in tangents] == [[3, 3], [3, 3]]
    assert [a.ravel().tolist() for a in net(z, t, t, None)] == [[2, 2], [2, 2]]
    wanted = [3, 2] if mode == "mixed" else [2, 2]
    assert [a.ravel().tolist() for a in net(z, t, r, None)] == [wanted, wanted]


def test_tpu_rounds_factors_but_not_results(runs):
    modes = {mode: values["u"] for mode, (values, _) in runs["torch"].items()}
    tpu, bfloat16 = (precision.relative_error(modes[name], modes[None]) for name in ("tpu", "bfloat16"))
    assert 2**-12 < tpu < bfloat16


def test_tpu_in_jax_rounds_the_factors_of_gradients_too():
    def product(a, b):
        return jnp.square(jax.jit(jnp.matmul)(jax.nn.silu(a), b)).sum()

    def rounded(a):
        return a.astype(jnp.bfloat16).astype(jnp.float32)

    a, b = np.random.default_rng(0).normal(size=(2, 8, 8)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        value, grad = precision_jax.with_rounded_factors(jax.value_and_grad(product, argnums=1))(a, b)
        factor = rounded(jax.nn.silu(a))
        c = factor @ rounded(b)
        np.testing.assert_allclose(value, jnp.square(c).sum(), rtol=1e-6)
        np.testing.assert_allclose(grad, factor.T @ rounded(2 * c), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("system", ["meanflow", "cifar10", "improved"])
def test_emulated_bfloat16_is_pytorchs_own_but_for_the_order_of_sums(system):
    (emulated, grads), (own, own_grads), (want, _) = (
        run("torch", mode, system, emulate=emulate)
        for mode, emulate in (
            (precision.MODES["bfloat16"], True), (precision.MODES["bfloat16"], False), (precision.REFERENCE, True),
        )
    )  # fmt: skip
    for name, a in want.items():
        assert precision.relative_error(emulated[name], own[name]) < 0.7 * precision.relative_error(own[name], a)
    assert precision.compare(grads, own_grads)[1]["gradient"] < 0.02


def test_a_mode_that_runs_in_float32_is_noticed(monkeypatch):
    monkeypatch.setattr(precision_torch, "Products", lambda rounded: contextlib.nullcontext())
    with pytest.raises(RuntimeError, match="mode tpu .* were not rounded"):
        command(monkeypatch, "--modes", "tpu")


def test_the_command_writes_tables_and_a_plot(monkeypatch, tmp_path):
    paths = {name: tmp_path / f"precision.{name}" for name in ("json", "markdown", "png")}
    files = [f"--json={paths['json']}", f"--markdown={paths['markdown']}", f"--plot={paths['png']}"]
    command(monkeypatch, "--modes", "float32", "bfloat16", *files)
    modes = json.loads(paths["json"].read_text())["digits"]["1.0"]["modes"]
    assert list(modes) == ["float32", "bfloat16"] and "| bfloat16 |" in paths["markdown"].read_text()
    assert paths["png"].stat().st_size > 0


def test_weights_of_a_file_take_the_place_of_random_ones(monkeypatch, tmp_path):
    config, path = precision.make_config("digits", "tiny"), tmp_path / "weights.safetensors"
    shapes, tables = precision_torch.shapes(config)
    weights = precision.random_weights(shapes, tables, ("adaLN_modulation",), scale=2.0)
    precision_torch.weights.save(path, weights, {})
    results = []
    for options in ([f"--weights={path}"], ["--scales=2"]):
        command(monkeypatch, "--modes", "float32", *options, f"--json={tmp_path / 'out.json'}")
        results += json.loads((tmp_path / "out.json").read_text())["digits"].values()
    assert results[0] == results[1]


def test_the_mean_error_is_told_from_what_averages_out():
    rng, total = np.random.default_rng(0), precision.Sum()
    for _ in range(400):
        total.add({"a": 3 + rng.normal(size=8), "b": rng.normal(size=(2, 4))})
    assert total.of_mean() == pytest.approx(8 * 9, rel=0.05)
    assert total.of_rest() == pytest.approx(16, rel=0.2)


def command(monkeypatch, *options):
    """Run the command on the tiny digits in PyTorch."""
    argv = ["precision.py", "--framework=torch", "--system=digits", "--size=tiny", "--seeds=2", "--scales=1"]
    monkeypatch.setattr(sys, "argv", [*argv, *options])
    precision.main()
