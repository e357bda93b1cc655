"""The command that compares one whole step: it agrees on what is equal, and sees what is not."""

import pytest

from configs import digits
from parity import full_step
from torch_impl.methods import meanflow


@pytest.fixture(scope="module")
def config():
    """A tiny transformer, whose step compiles in seconds."""
    config = digits.get_config()
    config.model.update(depth=1, width=16, num_heads=2)
    config.train.update(batch_size=8, compile=False)
    return config


def test_equal_steps_agree(config, capsys):
    assert full_step.compare(config)
    out = capsys.readouterr().out
    assert "dit: 0.01 million parameters" in out and "raw_error_jvp_rows" in out and "agree" in out


def test_a_wrong_derivative_is_seen(config, capsys, monkeypatch):
    monkeypatch.setattr(meanflow, "interval", lambda t, r, cfg: 0.9 * (t - r))
    assert not full_step.compare(config)
    assert "DISAGREE" in capsys.readouterr().out
