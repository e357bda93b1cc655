"""Four fake devices, or two processes, train as one device does, and no data moves but what must."""

import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from jax_impl import weights
from jax_impl.checkpoints import Checkpoints
from jax_impl.step import build_net, create_state, make_mesh
from meanflow.config.resolve import flatten, read_workdir, to_json

HERE = pathlib.Path(__file__).parent
BOUND = 1e-6  # absolute, on every parameter and EMA after five steps
REFERENCE = {"train.batch_size": 32, "train.clip_norm": 0.5, "method.omega": 0.8, "data.flip": True}
IMPROVED = {"train.batch_size": 32, "method.flow_fraction": 0.5}  # and what makes it improved MeanFlow
DECOUPLED = {"train.batch_size": 32, "method.omega": 0.6, "method.guidance_end": 0.7}  # and what makes it decoupled
COIN = {"method.flow_rows": "coin", "method.flow_fraction": 0.6, "method.label_drop": "front"}
FRONT = {"method.flow_rows": "front", "method.label_drop": "front", "method.guidance": False}
RECTIFIED = {"train.batch_size": 32}  # and what makes it Re-MeanFlow
# Name of the run by one device, by four: {what four devices change}.
ON_FOUR_DEVICES = {
    "data": ("one", {}),
    "coin_accumulate": ("one_coin", {"train.accumulate": 2}),
    "front_fsdp": ("one_front", {"train.fsdp": 2}),
    "data_and_fsdp_accumulate": ("one", {"train.fsdp": 2, "train.accumulate": 2}),
    "improved_accumulate": ("one_improved", {"train.fsdp": 2, "train.accumulate": 2}),
    "decoupled_accumulate": ("one_decoupled", {"train.fsdp": 2, "train.accumulate": 2}),
    "distilled_fsdp": ("one_distilled", {"train.fsdp": 2}),
    "rectified_accumulate": ("one_rectified", {"train.fsdp": 2, "train.accumulate": 2}),
}
TWO_PROCESSES = {"two_processes": {"train.fsdp": 2}, "fsdp_over_both": {"train.fsdp": 4}}  # on two devices each
REFERENCES = {name: reference for name, (reference, _) in ON_FOUR_DEVICES.items()} | dict.fromkeys(TWO_PROCESSES, "one")


@pytest.fixture(scope="module")
def trained(launcher, options, tiny, tiny_improved, tiny_flow, tiny_decoupled, tiny_rectified, tmp_path_factory):
    """Return the directory that holds the work directory of each run."""
    directory = tmp_path_factory.mktemp("devices")
    commands = []
    teacher = {"method.guidance_type": "distill", "method.teacher": str(directory / "teacher.safetensors")}
    save_teacher(tiny(tiny_flow), teacher["method.teacher"])
    decoupled = DECOUPLED | tiny_decoupled
    one = {
        "one": REFERENCE, "one_coin": REFERENCE | COIN, "one_front": REFERENCE | FRONT,
        "one_improved": IMPROVED | tiny_improved, "one_decoupled": decoupled,
        "one_distilled": decoupled | teacher, "one_rectified": RECTIFIED | tiny_rectified,
    }  # fmt: skip
    four = {name: one[reference] | changes for name, (reference, changes) in ON_FOUR_DEVICES.items()}
    for devices, cases in ((1, one), (4, four)):
        lines = [[str(directory / name), flatten(tiny(changes))] for name, changes in cases.items()]
        path = directory / f"{devices}.json"
        path.write_text(json.dumps({"devices": devices, "cases": lines}))
        commands.append(launcher.start(HERE / "run_cases.py", path))
    for name, changes in TWO_PROCESSES.items():
        commands += launcher.start_two(
            "jax", "jax_impl.main", *options(REFERENCE | changes), f"--workdir={directory / name}", "--cpu_devices=2"
        )
    for command in commands:
        assert command.wait() == 0, command.stderr
    return directory


def save_teacher(config, path):
    """Write weights of a flow model that are zero nowhere."""
    graphdef, params = build_net(config)
    rng = np.random.RandomState(0)
    params = jax.tree.map(lambda a: a + rng.normal(0, 0.1, a.shape).astype(np.float32), params)
    weights.save(path, weights.to_canonical(nnx.merge(graphdef, params), params), {})


def arrays(workdir):
    """Return {name: array} of the state in the newest checkpoint."""
    config = read_workdir(workdir)
    config.train.fsdp = 1
    _, like = create_state(config, make_mesh(config))
    state, _ = Checkpoints(workdir, config).restore(like)
    assert state.step == config.train.steps
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("case", REFERENCES)
def test_many_devices_train_as_one(trained, case):
    expected, found = arrays(trained / REFERENCES[case]), arrays(trained / case)
    assert found.keys() == expected.keys()
    difference = {name: float(np.abs(found[name] - expected[name]).max()) for name in expected}
    print(case, max(difference, key=difference.get), max(difference.values()))
    assert max(difference.values()) <= BOUND


@pytest.mark.parametrize("case", REFERENCES)
def test_many_devices_log_as_one(trained, case):
    expected, found = (
        [json.loads(line) for line in (trained / name / "metrics.jsonl").read_text().splitlines()]
        for name in (REFERENCES[case], case)
    )
    assert len(found) == 5
    for one, many in zip(expected, found, strict=True):
        assert many == pytest.approx(one, rel=1e-5, abs=1e-6)


def test_only_gradients_and_parameters_move(
    launcher, tiny, tiny_improved, tiny_decoupled, tiny_rectified, tmp_path
):  # fmt: skip
    """Slicing a sharded batch would need permutes or all-to-alls; so would activations sharded as parameters are."""
    cases = {
        "data": REFERENCE, "fsdp": REFERENCE | {"train.fsdp": 2}, "improved": IMPROVED | tiny_improved,
        "decoupled": DECOUPLED | tiny_decoupled, "rectified": RECTIFIED | tiny_rectified | {"method.stage1_steps": 0},
    }  # fmt: skip
    for name, changes in cases.items():
        (tmp_path / name).write_text(to_json(tiny(changes)))
    command = launcher.run(HERE / "collectives.py", *(tmp_path / name for name in cases))
    assert command.poll() == 0, command.stderr
    data, fsdp, improved, decoupled, rectified = (json.loads(line) for line in command.stdout.splitlines())
    for found in (data, improved, decoupled, rectified):
        assert set(found["collectives"]) == {"all-reduce"}
    assert set(fsdp["collectives"]) <= {"all-reduce", "all-gather", "reduce-scatter"}
    assert fsdp["collectives"]["all-gather"] <= 40  # once for each of the 25 parameters, give or take
    assert all(found["moved"] == 0 for found in (data, fsdp, improved, decoupled, rectified))
    assert "rematerialization" not in command.stderr
