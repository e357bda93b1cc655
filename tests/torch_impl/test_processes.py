"""Two gloo processes under torchrun train as one process does, however the work is divided."""

import functools
import json
import pathlib

import numpy as np
import pytest
import torch

from meanflow.config.store import flatten
from meanflow.config.workdir import read_workdir
from torch_impl import weights
from torch_impl.checkpoints import Checkpoints
from torch_impl.step import build_net, create_state

SCRIPT = pathlib.Path(__file__).with_name("run_cases.py")
BOUND = 1e-6  # absolute, on every parameter and EMA after five steps
# Name of the run by one process, by two: {what two processes change}.
REFERENCES = {
    "plain": {"method.guidance": False},
    "guided": {"method.omega": 0.8, "train.clip_norm": 0.5, "train.batch_size": 32},
    "coin": {"method.flow_rows": "coin", "method.flow_fraction": 0.6, "method.label_drop": "front"},
    "front": {"method.flow_rows": "front", "method.label_drop": "front", "method.guidance": False},
    "all_jvp": {"method.guidance": False, "method.flow_fraction": 0.0},  # the smallest graph, for the compiler's sake
    "kappa_0": {"method.omega": 2.0, "method.kappa": 0.0, "data.flip": True},
    # Several buckets of DDP, the first of which is full at 1 MiB.
    "wide": {"method.guidance": False, "method.flow_fraction": 0.0, "model.width": 128, "model.depth": 2},
}
IMPROVED = {"method.flow_fraction": 0.5, "train.batch_size": 32}  # and what makes it improved MeanFlow
DECOUPLED = {"method.omega": 0.6, "method.guidance_end": 0.7, "train.batch_size": 32}  # and what makes it decoupled
CASES = {
    "ddp": ("plain", {}),
    "ddp_guided": ("guided", {}),
    "ddp_accumulate": ("guided", {"train.accumulate": 4}),
    "ddp_coin_accumulate": ("coin", {"train.accumulate": 2}),
    "ddp_front": ("front", {}),
    "ddp_compiled": ("wide", {"train.compile": True}),
    "fsdp": ("kappa_0", {"train.fsdp": 2}),
    "ddp_improved_accumulate": ("improved", {"train.accumulate": 2}),
    "fsdp_improved": ("improved", {"train.fsdp": 2}),
    "ddp_decoupled_accumulate": ("decoupled", {"train.accumulate": 2}),
    "ddp_distilled": ("distilled", {}),
    "fsdp_distilled": ("distilled", {"train.fsdp": 2}),
    "ddp_rectified_accumulate": ("rectified", {"train.accumulate": 2}),
    "fsdp_rectified": ("rectified", {"train.fsdp": 2}),
    "fsdp_accumulate": ("guided", {"train.fsdp": 2, "train.accumulate": 2}),
    "fsdp_compiled": ("all_jvp", {"train.fsdp": 2, "train.compile": True}),
}
QUICK = ("ddp_accumulate", "fsdp_accumulate")  # they share their reference; the others are slow


@pytest.fixture(scope="module")
def trained(launcher, tmp_path_factory, tiny, tiny_improved, tiny_flow, tiny_decoupled, tiny_rectified):
    """Return a function (case) -> the directory in which it and its reference have their work directories.

    Cases that are quick are trained together, and so are the others: each start takes its time.
    """
    directory = tmp_path_factory.mktemp("processes")
    teacher = {"method.guidance_type": "distill", "method.teacher": str(directory / "teacher.safetensors")}
    save_teacher(tiny(tiny_flow), teacher["method.teacher"])
    decoupled = DECOUPLED | tiny_decoupled
    one = REFERENCES | {
        "improved": IMPROVED | tiny_improved, "decoupled": decoupled, "distilled": decoupled | teacher,
        "rectified": {"train.batch_size": 32} | tiny_rectified,
    }  # fmt: skip

    @functools.cache
    def train(quick):
        group = directory / ("quick" if quick else "slow")
        group.mkdir()
        names = {name: reference for name, (reference, _) in CASES.items() if (name in QUICK) == quick}
        runs = {
            "one": {reference: one[reference] for reference in names.values()},
            "two": {name: one[reference] | CASES[name][1] for name, reference in names.items()},
        }
        for title, cases in runs.items():
            lines = [[str(group / name), flatten(tiny(changes))] for name, changes in cases.items()]
            (group / f"{title}.json").write_text(json.dumps(lines))
        torchrun = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")
        commands = [launcher.start(SCRIPT, group / "one.json"), launcher.start(*torchrun, SCRIPT, group / "two.json")]
        for command in commands:
            assert command.wait() == 0, command.stderr
        return group

    return lambda case: train(case in QUICK)


def save_teacher(config, path):
    """Write a flow model whose weights are zero nowhere."""
    net, rng = build_net(config).requires_grad_(False), np.random.RandomState(0)
    for p in net.parameters():
        p.copy_(torch.from_numpy(0.1 * rng.randn(*p.shape)))
    weights.save(path, weights.to_canonical(net, dict(net.named_parameters())), {})


def tensors(workdir):
    """Return {name: tensor} of the parameters, EMAs and optimizer state in the newest checkpoint."""
    config = read_workdir(workdir)
    state, _ = Checkpoints(workdir, config).restore(create_state(config, None, torch.device("cpu")))
    assert state.step == config.train.steps
    found = {f"params.{name}": p for name, p in state.net.named_parameters()}
    for i, ema in enumerate(state.emas):
        found |= {f"ema{i}.{name}": a for name, a in ema.items()}
    for name, p in state.net.named_parameters():
        found |= {f"{key}.{name}": a for key, a in state.optimizer.state[p].items()}
    return {name: a.detach().numpy() for name, a in found.items()}


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES])
def test_two_processes_train_and_log_as_one(trained, case):
    reference, run = trained(case) / CASES[case][0], trained(case) / case
    expected, found = tensors(reference), tensors(run)
    assert found.keys() == expected.keys()
    difference = {name: float(np.abs(found[name] - expected[name]).max()) for name in expected}
    worst = max(difference, key=difference.get)
    assert difference[worst] <= BOUND, worst
    expected, found = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (reference, run)
    )
    assert len(found) == 5
    for one, two in zip(expected, found, strict=True):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-6)
