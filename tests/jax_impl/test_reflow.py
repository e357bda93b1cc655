"""The couplings command: which weights it reads.  What it computes is parity's."""

from jax_impl import reflow as command
from meanflow.config import options


def test_weights_of_a_work_directory(tmp_path, monkeypatch):
    config = options.get_config()
    config.sample.ema = 2
    monkeypatch.setattr(command.checkpoints, "read_weights", lambda path, ema, step: (config, (path, ema, step)))
    assert command.load(str(tmp_path), config) == (str(tmp_path), 2, None)
    assert command.load(str(tmp_path), config, 40) == (str(tmp_path), 2, 40)
