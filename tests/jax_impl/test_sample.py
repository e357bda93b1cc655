"""The sampler: images as the method makes them, of the guidance asked for, from weights with or without v heads."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_impl import sample, weights
from jax_impl.methods import improved
from jax_impl.step import build_net
from meanflow.commands import sample as sampling
from meanflow.config import latents
from meanflow.config.store import to_json
from meanflow.errors import UserError

pytestmark = pytest.mark.usefixtures("optimize_less")
NOISE = np.random.RandomState(0).randn(3, 8, 8, 1).astype(np.float32)
LABELS = np.array([1, 10, 0], np.int32)


@pytest.fixture(scope="module")
def config(tiny_improved, tiny):
    return tiny(tiny_improved | {"sample.steps": 2})


@pytest.fixture(scope="module")
def canonical(config):
    """Return weights that are zero nowhere, with v heads."""
    graphdef, params = build_net(config)
    fresh, rng = weights.to_canonical(nnx.merge(graphdef, params), params), np.random.RandomState(1)
    return {name: rng.randn(*a.shape).astype(np.float32) for name, a in fresh.items()}


@pytest.fixture
def load(config, canonical, parse_flags, tmp_path):
    """Return a function that loads, of the weights, those with names that it is told to keep."""

    def load(keep=lambda name: True):
        parse_flags(sampling.define_sample_flags)
        weights.save(tmp_path / "w.safetensors", {n: a for n, a in canonical.items() if keep(n)}, {})
        return sample.load(None, tmp_path / "w.safetensors", config)

    return load


def asked(config, omega, interval):
    c = config.sample.copy_and_resolve_references()
    c.update(omega=omega, interval=interval)
    return c


def test_the_guidance_asked_for_reaches_the_network_in_one_compilation(config, load, monkeypatch):
    traces, different, method_sample = [], [], improved.sample
    monkeypatch.setattr(improved, "sample", lambda *args: traces.append(1) or method_sample(*args))
    c, sampler, params = load()
    net = nnx.merge(build_net(c)[0], params)
    for omega, interval in ((1.0, (0.0, 1.0)), (8.0, (0.0, 1.0)), (8.0, (0.4, 0.65)), (3, (0, 1))):
        images = sampler(params, NOISE, LABELS, asked(config, omega, interval))
        given = {"omega": omega, "t_min": interval[0], "t_max": interval[1]}
        assert isinstance(images, np.ndarray) and images.shape == NOISE.shape
        want = method_sample(net, jnp.asarray(NOISE), LABELS, given, config.sample)
        np.testing.assert_allclose(images, want, atol=1e-4)
        different.append(images)
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(different) for b in different[:i])
    assert len(traces) == 1


def test_weights_without_the_head_of_v_sample_the_same(config, load):
    (with_v, sampler, params), (without, other, fewer) = load(), load(lambda name: not name.startswith("v_heads."))
    assert not with_v.model.v_heads and not without.model.v_heads and config.model.v_heads
    expected = sampler(params, NOISE, LABELS, config.sample)
    np.testing.assert_array_equal(other(fewer, NOISE, LABELS, config.sample), expected)


def test_other_weights_must_be_there(config, load):
    with pytest.raises(UserError, match="lack u_heads"):
        _, sampler, params = load(lambda name: not name.startswith("u_heads."))
        sampler(params, NOISE, LABELS, config.sample)


def test_weights_of_latents_are_not_for_pixels(config, canonical, parse_flags, tmp_path):
    parse_flags(sampling.define_sample_flags)
    theirs = {"latents": json.dumps(latents.to_dict(latents.CONVENTIONS["sd"]))}
    weights.save(tmp_path / "w.safetensors", canonical, theirs)
    with pytest.raises(UserError, match="has no latents, but .*w.safetensors has latents of the convention 'sd'"):
        sample.load(None, tmp_path / "w.safetensors", config)


def test_devices_share_the_rows(launcher, tiny, tmp_path):
    """Of four rows three devices have two each, the last of them nothing but filling; so has the noise drawn anew."""
    (tmp_path / "config.json").write_text(to_json(tiny({"sample.sampler": "restart", "sample.steps": 2})))
    script = pathlib.Path(__file__).with_name("sample_on_devices.py")
    command = launcher.run(script, tmp_path / "config.json", 4)
    assert command.poll() == 0, command.stderr
    found = json.loads(command.stdout)
    one, three = np.array(found["one"]), np.array(found["three"])
    assert one.shape == three.shape == (4, 8, 8, 1) and one.std() > 0.1
    np.testing.assert_allclose(three, one, atol=1e-5)
    assert found["rows"] == [[0, 2], [2, 4], [4, 6]]
