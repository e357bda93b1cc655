"""Flow models whose time runs the other way: which they are, and that turning them round is exact."""

import argparse

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jax_impl import weights as jax_weights
from jax_impl.step import abstract_net
from meanflow.errors import UserError
from meanflow.weights import reading, times
from meanflow.weights.infer import inferred_config
from parity import check, convert
from parity.golden import fixtures
from torch_impl import weights as torch_weights
from torch_impl.step import build_net

SIT = {"path_type": "Linear", "prediction": "velocity", "train_eps": None}
REPA = {"path_type": "linear", "prediction": "v", "enc_type": "dinov2-vit-b"}
FIXTURE = fixtures.Fixture(check.GOLDEN / "dmf_sit_torch.npz")
HEADS = 4


def flow(projectors=False):
    """Return weights of a small official SiT."""
    params = FIXTURE.under("param/")
    return {n: a for n, a in params.items() if projectors or not n.startswith("projectors.")}


def with_sigma(weights):
    """Return the weights of a network that predicts a sigma, too: of each pixel, c channels and then c others."""
    channels = weights["x_embedder.proj.weight"].shape[1]
    noise = np.random.RandomState(0)

    def both(a):
        pixels = a.reshape(-1, channels, *a.shape[1:])
        return np.concatenate([pixels, noise.normal(size=pixels.shape)], axis=1).reshape(-1, *a.shape[1:])

    return weights | {n: both(a).astype(a.dtype) for n, a in weights.items() if n.startswith("final_layer.linear.")}


def converted(weights, tmp_path, *options, **entries):
    state = {"ema": {name: torch.from_numpy(np.array(a)) for name, a in weights.items()}}
    torch.save(state | entries, tmp_path / "sit.pt")
    convert.main([str(tmp_path / "sit.pt"), str(tmp_path / "sit.safetensors"), *options])
    return torch_weights.load(tmp_path / "sit.safetensors")


def velocities(weights, framework, t):
    """Return the velocity of a framework's network for the fixture's images, at times t, as [b c h w]."""
    config = inferred_config(weights)
    config.model.num_heads = HEADS
    x, y = FIXTURE.get("in/fwd/x"), FIXTURE.get("in/fwd/y")
    if framework == "torch":
        net = build_net(config)
        net.load_state_dict(torch_weights.from_canonical(net, weights))
        arguments = torch.from_numpy(x), torch.from_numpy(t), torch.from_numpy(t), torch.from_numpy(y)
        return net(*arguments).detach().numpy()
    graphdef, params = abstract_net(config)
    net = nnx.merge(graphdef, jax_weights.from_canonical(nnx.merge(graphdef, params), weights))
    return np.asarray(net(jnp.asarray(x.transpose(0, 2, 3, 1)), jnp.asarray(t), jnp.asarray(t), y)).transpose(
        0, 3, 1, 2
    )


def error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_turned_network_is_the_official_one_at_the_mirrored_time(framework, tmp_path):
    """The fixture holds an official network's output v(x, t); as a SiT's, ours at 1 - t is its negative."""
    weights = converted(with_sigma(flow()), tmp_path)
    t, expected = FIXTURE.get("in/fwd/t"), -FIXTURE.get("out/fwd/v")
    mirrored = (1 - t.astype(np.float64)).astype(np.float32)
    assert error(velocities(weights, framework, mirrored), expected) < 1e-6
    assert error(velocities(weights, framework, t), expected) > 0.01


MUTATIONS = {
    "sign": lambda w: w | {n: -a for n, a in w.items() if n.startswith(times.LAST)},
    "time": lambda w: w | {times.FEATURES: flow()[times.FEATURES]},
    "halves": lambda w: w | {times.FEATURES: np.roll(w[times.FEATURES], w[times.FEATURES].shape[1] // 2, axis=1)},
    "sigma": lambda w: w | {n: a[::-1].copy() for n, a in w.items() if n.startswith(times.LAST)},
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_the_comparison_would_catch(mutation, tmp_path):
    t = FIXTURE.get("in/fwd/t")
    weights = MUTATIONS[mutation](converted(with_sigma(flow()), tmp_path))
    assert error(velocities(weights, "torch", 1 - t), -FIXTURE.get("out/fwd/v")) > 1e-3


def test_turning_twice_is_the_identity():
    weights = flow()
    twice = times.turned(times.turned(weights))
    assert all(np.abs(twice[name] - a).max() < 1e-6 for name, a in weights.items())


@pytest.mark.parametrize("kind", [lambda options: argparse.Namespace(**options), dict])
def test_the_options_of_the_trainer_tell(tmp_path, kind, capsys):
    turned = converted(flow(), tmp_path, args=kind(SIT))
    assert "its time is taken to run the other way" in capsys.readouterr().err
    assert not np.array_equal(turned[times.FEATURES], flow()[times.FEATURES])
    for weights, options in ((flow(), {"args": kind(REPA)}), (flow(projectors=True), {})):
        kept = converted(weights, tmp_path, **options)
        assert all(np.array_equal(kept[name], a) for name, a in weights.items() if name != "pos_embed")
    assert "time" not in capsys.readouterr().err
    for wrong in ({"path_type": "GVP"}, {"prediction": "noise"}):
        with pytest.raises(UserError, match="only its linear path and velocity"):
            converted(flow(), tmp_path, args=kind(SIT | wrong))


def test_a_sit_that_says_nothing_is_said_to_be_taken_as_ours(tmp_path, capsys):
    kept = converted(flow(), tmp_path)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "time" in line]
    assert "taken to run as here" in line and "--time=reversed" in line and "willisma/SiT" in line
    assert np.array_equal(kept[times.FEATURES], flow()[times.FEATURES])
    convert.main([str(tmp_path / "sit.safetensors"), str(tmp_path / "again.pt")])
    assert "time" not in capsys.readouterr().err


def test_the_direction_can_be_given(tmp_path, capsys):
    turned = converted(flow(), tmp_path, "--time=reversed")
    assert np.allclose(turned[times.FEATURES], times.turned(flow())[times.FEATURES])
    kept = converted(with_sigma(flow()), tmp_path, "--time=ours")
    said = capsys.readouterr()
    assert "taken" not in said.err and "a sigma that sampling does not read" in said.err
    assert "its time turned round" in said.out and "without its sigma" in said.out
    assert all(np.array_equal(kept[name], a) for name, a in flow().items() if name != "pos_embed")


def test_only_flow_models_can_be_turned(tmp_path, capsys):
    weights = fixtures.Fixture(check.GOLDEN / "sit_torch.npz").under("param/")
    converted(weights, tmp_path)
    assert "time" not in capsys.readouterr().err
    with pytest.raises(UserError, match="--time=reversed is for weights of the original SiT"):
        converted(weights, tmp_path, "--time=reversed")


def test_weights_of_this_project_are_not_judged(tmp_path, capsys):
    converted(flow(), tmp_path)
    capsys.readouterr()
    path = tmp_path / "sit.safetensors"
    assert reading.read(path).weights.keys() == flow().keys() and not capsys.readouterr().err
    turned = reading.read(path, reading.Choice(time="reversed")).weights
    assert np.allclose(turned[times.FEATURES], times.turned(flow())[times.FEATURES])
