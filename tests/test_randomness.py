"""No code of the project reads or changes global random state, which other code may use too."""

import pathlib
import re

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
    """GPUs too, and the weights of a seed are those that PyTorch's own seeding gives."""
    config, seeded = tiny(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    before = torch.get_rng_state()
    net = step.build_net(config)
    assert not seeded and torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step.fold(config.seed, 0))
        expected = step.ARCHITECTURES[config.model.name](config.model)
    assert seeded  # PyTorch's own seeding reaches the GPUs
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), expected.parameters(), strict=True))
