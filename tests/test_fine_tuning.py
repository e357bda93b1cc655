"""A run on three classes from weights of seven, of another resolution or without a head, in both frameworks."""

import json

import jax
import numpy as np
import pytest
import tiny
import torch
from flax import nnx

from jax_impl import step as jax_step
from jax_impl import train as jax_train
from jax_impl import weights as jax_weights
from meanflow.config import checks
from meanflow.errors import UserError
from meanflow.weights import canonical, files
from parity.adapters import frameworks
from parity.cases import objectives
from torch_impl import step as torch_step
from torch_impl import train as torch_train
from torch_impl import weights as torch_weights

pytestmark = pytest.mark.usefixtures("optimize_less")

STEPS, OLD, NEW = 3, 7, 3
BOUND = 1e-5  # relative, in float32
SYSTEMS = {
    "dit": {"method.adaptive_power": 0.0},  # otherwise the loss is 1 by construction
    "imf_dit": {"model.name": "imf_dit", "method.name": "improved"},
    "edm2": {"model.name": "edm2", "method.name": "rectified"},
}


def config_of(system, num_classes, changes=()):
    changes = SYSTEMS[system] | {"model.num_classes": num_classes, "train.learning_rate": 1e-2} | dict(changes)
    return checks.check(tiny.make(*tiny.split(changes)))


@pytest.fixture
def pretrained(tmp_path):
    """Return a function (system, classes) -> file of canonical weights of so many, random everywhere, and these."""

    def make(system, num_classes=OLD):
        given = objectives.random_weights(config_of(system, num_classes))
        given = {name: np.asarray(a, np.float32) for name, a in given.items()}
        files.save(tmp_path / f"{system}.safetensors", given, {})
        return str(tmp_path / f"{system}.safetensors"), given

    return make


def starts(config):
    """Return the canonical weights with which each framework's trainer starts."""
    graphdef, state, _ = jax_train.start_state(config, jax_step.make_mesh(config))
    with_jax = jax_weights.to_canonical(nnx.merge(graphdef, state.params), state.params)
    state, _ = torch_train.start_state(config, None, torch.device("cpu"))
    return {"jax": with_jax, "torch": torch_weights.to_canonical(state.net, dict(state.net.named_parameters()))}


def transferred(config, given, load_classes=""):
    """Return for each framework the canonical weights of a fresh network, and those with which it starts.

    In JAX, where drawing takes long, fresh parameters are ones.
    """
    graphdef, shapes = jax_step.abstract_net(config)
    params = jax.tree.map(lambda a: np.ones(a.shape, a.dtype), shapes)
    net = nnx.merge(graphdef, params)
    loaded = jax_weights.from_canonical(net, jax_weights.transfer(net, params, given, True, load_classes))
    with_jax = jax_weights.to_canonical(net, params), jax_weights.to_canonical(net, loaded)
    net = torch_step.build_net(config)
    params = dict(net.named_parameters())
    loaded = torch_weights.from_canonical(net, torch_weights.transfer(net, params, given, True, load_classes))
    return [with_jax, (torch_weights.to_canonical(net, params), torch_weights.to_canonical(net, loaded))]


def losses(f, config, start):
    """Return the losses of the first steps from canonical weights, on given batches and draws."""
    batches = [objectives.batch(config, seed) for seed in range(STEPS)]
    found = []
    for k, (rows, draws) in enumerate(batches):
        net = f.build(config, start)
        net = f.build(config, f.train(net, config, batches[:k])[0]["params"]) if k else net
        found.append(float(f.loss(net, rows, draws, config.method)[0]))
    return np.array(found)


@pytest.mark.parametrize(("old", "rows"), [(OLD, [5, 2, 0]), (1000, list(range(999, 0, -100)))])
def test_both_frameworks_fine_tune_alike_from_rows_of_other_classes(old, rows, pretrained, tmp_path):
    """All rows are taken from the file, so that nothing depends on the frameworks' own random numbers."""
    path, given = pretrained("dit", old)
    names = [f"class {i}" for i in range(old)]
    (tmp_path / "names.json").write_text(json.dumps({"from": names, "to": [names[i] for i in rows]}))
    config = config_of("dit", len(rows), {"train.load_from": path, "train.load_classes": str(tmp_path / "names.json")})
    name = canonical.CLASSES[0]
    with frameworks.full_precision():
        start = starts(config)
        for own in start.values():
            np.testing.assert_array_equal(own[name], given[name][[*rows, old]])
            assert all(np.array_equal(own[other], given[other]) for other in given if other != name)
        found = {key: losses(f, config, start[key]) for key, f in frameworks.FRAMEWORKS.items()}
        start["torch"][name] = given[name][[*reversed(rows), old]]
        others = losses(frameworks.FRAMEWORKS["torch"], config, start["torch"])
    np.testing.assert_allclose(found["jax"], found["torch"], rtol=BOUND)
    assert np.abs(others / found["torch"] - 1).max() > 100 * BOUND  # the rows matter
    assert np.abs(np.diff(found["torch"])).min() > 100 * BOUND


def test_fresh_rows_and_another_resolution(pretrained, caplog):
    path, given = pretrained("dit")
    config = config_of("dit", NEW, {"model.input_size": 12, "train.load_from": path})
    [name] = given.keys() & {*canonical.CLASSES}
    caplog.set_level("INFO", logger="absl")
    start = starts(config)
    text = f"{name} (3 of 3 classes) start fresh; pos_embed (16 positions), {name} (7 of 7 classes) are left out"
    assert caplog.text.count(f"of the weights to start from, {len(given) - 2} are kept; {text}") == 2
    for key, f in frameworks.FRAMEWORKS.items():
        fresh = f.fresh_weights(config, [config.seed])[0]
        np.testing.assert_allclose(start[key][name], [*fresh[name][:NEW], given[name][OLD]], rtol=1e-6)
        np.testing.assert_array_equal(start[key]["pos_embed"], fresh["pos_embed"])


def test_columns_of_edm2(pretrained, tmp_path):
    _, given = pretrained("edm2")
    (tmp_path / "rows.json").write_text("[5, null, 0]")
    for fresh, start in transferred(config_of("edm2", NEW), given, str(tmp_path / "rows.json")):
        columns = given[canonical.LABELS][:, 5], fresh[canonical.LABELS][:, 1], given[canonical.LABELS][:, 0]
        np.testing.assert_array_equal(start[canonical.LABELS].T, columns)
        assert all(np.array_equal(start[name], given[name]) for name in given if name != canonical.LABELS)


def test_released_improved_meanflow_starts_with_a_fresh_head_of_v(pretrained, caplog):
    _, given = pretrained("imf_dit")
    head = sorted(name for name in given if name.startswith(("v_heads.", "v_final_layer.")))
    caplog.set_level("INFO", logger="absl")
    released = {name: a for name, a in given.items() if name not in head}
    for fresh, start in transferred(config_of("imf_dit", OLD), released):
        assert start.keys() == given.keys()
        assert all(np.array_equal(a, (fresh if name in head else given)[name]) for name, a in start.items())
    assert caplog.text.count(f"{len(released)} are kept; {', '.join(head)} start fresh") == 2 and len(head) > 5


def test_a_teacher_of_other_classes_is_refused(pretrained):
    """As weights alone, which have no config to compare."""
    path, given = pretrained("dit")
    files.save(path, {name: a for name, a in given.items() if not name.startswith("r_embedder.")}, {})
    changes = {"model.name": "dmf_dit", "method.name": "decoupled", "model.num_classes": NEW}
    config = tiny.make(*tiny.split(changes | {"method.guidance_type": "distill", "method.teacher": path}))
    for load in (
        lambda: jax_train.load_teacher(config, jax_step.make_mesh(config)),
        lambda: torch_train.load_teacher(config, torch.device("cpu")),
    ):
        with pytest.raises(UserError, match=r"num_classes 7, this network has config\.model\.num_classes 3"):
            load()
