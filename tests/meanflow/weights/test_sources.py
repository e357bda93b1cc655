"""Weights of the original SiT, whose time runs backwards, are told by their marks, or warned of."""

import argparse

import numpy as np
import pytest
import torch

from meanflow.errors import UserError
from parity import check, convert
from parity.golden import fixtures

SIT = {"path_type": "Linear", "prediction": "velocity", "train_eps": None}
REPA = {"path_type": "linear", "prediction": "v", "enc_type": "dinov2-vit-b"}


def flow(projectors):
    """Return weights of a small official SiT."""
    params = fixtures.Fixture(check.GOLDEN / "dmf_sit_torch.npz").under("param/")
    return {n: a for n, a in params.items() if projectors or not n.startswith("projectors.")}


def converted(weights, tmp_path, **entries):
    state = {"ema": {name: torch.from_numpy(np.array(a)) for name, a in weights.items()}}
    torch.save(state | entries, tmp_path / "sit.pt")
    convert.main([str(tmp_path / "sit.pt"), str(tmp_path / "sit.safetensors")])


def test_a_learned_sigma_is_that_of_sit(tmp_path):
    weights = flow(projectors=False)
    weights |= {n: np.concatenate([a, a]) for n, a in weights.items() if n.startswith("final_layer.linear.")}
    with pytest.raises(UserError, match=r"learned sigma: .* original SiT .* the reverse of this project.* --time"):
        converted(weights, tmp_path)


@pytest.mark.parametrize("kind", [lambda options: argparse.Namespace(**options), dict])
def test_the_options_of_the_trainer_tell(tmp_path, kind, capsys):
    with pytest.raises(UserError, match="written by the trainer of the original SiT .* --time"):
        converted(flow(projectors=False), tmp_path, args=kind(SIT))
    converted(flow(projectors=False), tmp_path, args=kind(REPA))
    converted(flow(projectors=True), tmp_path)
    assert "warning" not in capsys.readouterr().err


def test_a_sit_that_says_nothing_is_warned_of_once(tmp_path, capsys):
    converted(flow(projectors=False), tmp_path)
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "says which way its time runs" in line and "--time" in line and "willisma/SiT" in line
    convert.main([str(tmp_path / "sit.safetensors"), str(tmp_path / "again.pt")])
    assert "warning" not in capsys.readouterr().err


def test_networks_that_sit_does_not_have_are_not_warned_of(tmp_path, capsys):
    converted(fixtures.Fixture(check.GOLDEN / "sit_torch.npz").under("param/"), tmp_path)
    assert "warning" not in capsys.readouterr().err
