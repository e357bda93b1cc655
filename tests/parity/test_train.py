"""Runs side by side: what is measured, what is reported, and what is noticed."""

import json

import jax
import numpy as np
import pytest

from parity import train, trainers
from torch_impl import portable

SYSTEMS = {"dit": "meanflow", "unet": "meanflow", "imf_dit": "improved", "edm2": "flow"}


@pytest.fixture(autouse=True)
def precision():
    """Restore JAX's precision."""
    names = ("jax_default_matmul_precision", "jax_enable_x64")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def settings(tiny, dtype="float64", **changes):
    return train.settings(tiny({"train.steps": 8} | changes), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("network", SYSTEMS)
def test_runs_that_stay_and_runs_that_move_are_one(network, tiny):
    """In float64, with weights that are updated at a rate that leaves the start behind."""
    changes = {"model.name": network, "method.name": SYSTEMS[network], "train.learning_rate": 1e-2}
    config = settings(tiny, **changes)
    curves, differences = train.compare(config, 6, switch=3)
    assert curves.keys() == {"jax", "torch", "jax to torch", "torch to jax"}
    assert all(len(values) == 6 for found in curves.values() for values in found.values())
    assert not train.beyond(differences, "float64")
    assert {"loss", "grad_norm", "parameters", "EMA 0", "EMA 1"} <= differences["jax to torch"].keys()
    assert max(max(found.values()) for run in differences.values() for found in run.values()) < 1e-10
    assert len(set(curves["jax"]["raw_error"])) == 6


MUTATIONS = {
    "an EMA left behind": lambda s: s._replace(emas=(s.params, *s.emas[1:])),
    "a moment that doubles": lambda s: s._replace(
        second_moments={n: a if n == "pos_embed" else 2 * a for n, a in s.second_moments.items()}
    ),
    "a step off by one": lambda s: s._replace(step=s.step + 1),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_a_switch_loses_is_noticed(mutation, tiny, monkeypatch):
    right = portable.adopt
    monkeypatch.setattr(portable, "adopt", lambda like, given: right(like, MUTATIONS[mutation](given)))
    config = settings(tiny, **{"train.learning_rate": 1e-2})
    problems = train.beyond(train.compare(config, 4, switch=2)[1], "float64")
    assert problems and all(line.startswith("jax to torch: ") for line in problems)


def test_other_draws_are_noticed(tiny, monkeypatch):
    """Of PyTorch alone, by one row."""
    right = trainers.TorchTrainer.step

    def step(self, batch):
        return right(self, batch | {"draws.noise": np.roll(batch["draws.noise"], 1, axis=0)})

    monkeypatch.setattr(trainers.TorchTrainer, "step", step)
    assert train.beyond(train.compare(settings(tiny), 2)[1], "float64")


@pytest.mark.slow
def test_the_command_writes_a_page(launcher, options, tmp_path):
    argv = ["parity/train.py", *options(), "--steps=4", "--switch=2", f"--output={tmp_path / 'out'}"]
    command = launcher.run(*argv)
    assert command.wait() == 0, command.stderr
    found = json.loads((tmp_path / "out/train.json").read_text())
    assert "torch, 1 thread" in found["curves"] or "torch, 2 threads" in found["curves"]
    assert "jax to torch" in command.stdout and "EMA 1" in command.stdout
    page = (tmp_path / "out/train.html").read_text()
    assert page.count("<img") == 2 and "within their bounds" in page and (tmp_path / "out/train.png").is_file()
    command = launcher.run(*argv, "--switch=4")
    assert command.wait() == 2 and "--switch is 4; it must be below --steps" in command.stderr
