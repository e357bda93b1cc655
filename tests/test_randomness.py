"""No code of the project reads or changes global random state, which other code may use too."""

import pathlib
import re

import numpy as np
import pytest
import torch

from torch_impl import step

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("configs", "meanflow", "jax_impl", "torch_impl", "parity", "benchmarks")
GLOBAL = re.compile(
    r"""
    torch\.(cuda\.)?(manual_seed|seed)\b | manual_seed_all | set_rng_state    # every generator of PyTorch
    | \b(np|numpy)\.random\.(?!RandomState|Generator|default_rng|Philox|SeedSequence)\w+    # numpy's own generator
    | ^\s*(import\ random|from\ random\ import)\b
    """,
    re.VERBOSE | re.MULTILINE,
)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_global_random_state(package):
    for path in (ROOT / package).rglob("*.py"):
        code = re.sub(r"#.*", "", path.read_text())
        assert not GLOBAL.search(code), (path, GLOBAL.search(code))


def test_fresh_weights_leave_every_generator_alone(tiny, monkeypatch):
    """Those of PyTorch, of its GPUs and of numpy."""
    config, seeded = tiny(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    before, of_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    step.build_net(config)
    step.ARCHITECTURES[config.model.name](config.model)
    assert not seeded and torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], of_numpy)
