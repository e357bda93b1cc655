"""What the trainers' steps receive as draws, however many processes, devices and micro-batches divide the batch."""

import pathlib

import numpy as np
import pytest

from meanflow.data import draws

SCRIPT = pathlib.Path(__file__).with_name("helpers") / "dump_draws.py"
STEP = 7
CASES = {  # framework, processes, devices of each, options
    "jax": ("jax", 1, 1, {}),
    "jax_devices": ("jax", 1, 4, {"train.accumulate": 2}),
    "jax_processes": ("jax", 2, 2, {}),
    "torch": ("torch", 1, 1, {"train.accumulate": 2}),
    "torch_processes": ("torch", 2, 1, {}),
    "torch_4_processes": ("torch", 4, 1, {}),
}


@pytest.mark.parametrize(
    "case", [c if c in ("jax_processes", "torch") else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_the_draws_of_a_step_are_a_function_of_its_number(case, launcher, options, tiny, tmp_path):
    framework, processes, devices, changes = CASES[case]
    changes = {"method.flow_rows": "front", "method.guidance": False, "train.steps": STEP + 1} | changes
    argv = [SCRIPT, framework, STEP, tmp_path, *options(changes), f"--workdir={tmp_path / 'run'}"]
    argv += [f"--cpu_devices={devices}"] if framework == "jax" else []
    commands = launcher.start_processes(framework, processes, *argv) if processes > 1 else [launcher.start(*argv)]
    for command in commands:
        assert command.wait() == 0, command.stderr
    parts = [np.load(tmp_path / f"{process}.npz") for process in range(processes)]
    for name, a in draws.split(draws.of_process(tiny(changes), STEP))[1].items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), a, err_msg=name)
        assert parts[0][name].dtype == np.float32
