"""Four fake devices, or two processes, train as one device does, and no data moves but what must."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from jax_impl import weights
from jax_impl.checkpoints import Checkpoints
from jax_impl.step import build_net, create_state, make_mesh
from meanflow.config.store import flatten, to_json
from meanflow.config.workdir import read_workdir

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
QUICK = ("data_and_fsdp_accumulate", "two_processes")  # they share their reference; the others are slow
REFERENCES = {name: reference for name, (reference, _) in ON_FOUR_DEVICES.items()} | dict.fromkeys(TWO_PROCESSES, "one")


@pytest.fixture(scope="module")
def trained(launcher, options, tiny, tiny_improved, tiny_flow, tiny_decoupled, tiny_rectified, tmp_path_factory):
    """Return a function (case) -> the directory in which it and its reference have their work directories.

    Cases that are quick are trained together, and so are the others: each start takes its time.
    """
    directory = tmp_path_factory.mktemp("devices")
    teacher = {"method.guidance_type": "distill", "method.teacher": str(directory / "teacher.safetensors")}
    save_teacher(tiny(tiny_flow), teacher["method.teacher"])
    decoupled = DECOUPLED | tiny_decoupled
    one = {
        "one": REFERENCE, "one_coin": REFERENCE | COIN, "one_front": REFERENCE | FRONT,
        "one_improved": IMPROVED | tiny_improved, "one_decoupled": decoupled,
        "one_distilled": decoupled | teacher, "one_rectified": RECTIFIED | tiny_rectified,
    }  # fmt: skip

    @functools.cache
    def train(quick):
        group = directory / ("quick" if quick else "slow")
        group.mkdir()
        names = {name: reference for name, reference in REFERENCES.items() if (name in QUICK) == quick}
        four = {n: one[r] | ON_FOUR_DEVICES[n][1] for n, r in names.items() if n in ON_FOUR_DEVICES}
        commands = []
        for devices, cases in ((1, {reference: one[reference] for reference in names.values()}), (4, four)):
            lines = [[str(group / name), flatten(tiny(changes))] for name, changes in cases.items()]
            (group / f"{devices}.json").write_text(json.dumps({"devices": devices, "cases": lines}))
            commands.append(launcher.start(HERE / "run_cases.py", group / f"{devices}.json"))
        for name in names.keys() & TWO_PROCESSES.keys():
            flags = (*options(REFERENCE | TWO_PROCESSES[name]), f"--workdir={group / name}", "--cpu_devices=2")
            commands += launcher.start_two("jax", "jax_impl.main", *flags)
        for command in commands:
            assert command.wait() == 0, command.stderr
        return group

    return lambda case: train(case in QUICK)


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


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in REFERENCES])
def test_many_devices_train_and_log_as_one(trained, case):
    reference, run = trained(case) / REFERENCES[case], trained(case) / case
    expected, found = arrays(reference), arrays(run)
    assert found.keys() == expected.keys()
    difference = {name: float(np.abs(found[name] - expected[name]).max()) for name in expected}
    worst = max(difference, key=difference.get)
    assert difference[worst] <= BOUND, worst
    expected, found = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (reference, run)
    )
    assert len(found) == 5
    for one, many in zip(expected, found, strict=True):
        assert many == pytest.approx(one, rel=1e-5, abs=1e-6)


@pytest.fixture
def collectives(launcher, tmp_path):
    """Return a function (configs) -> what the compiled steps of each do on four devices, see collectives.py."""

    def run(*configs):
        paths = [tmp_path / str(number) for number in range(len(configs))]
        for path, config in zip(paths, configs, strict=True):
            path.write_text(to_json(config))
        command = launcher.run(HERE / "collectives.py", *paths)
        assert command.poll() == 0, command.stderr
        assert "rematerialization" not in command.stderr
        found = [json.loads(line) for line in command.stdout.splitlines()]
        assert all(one["moved"] == 0 for one in found)
        return [one["collectives"] for one in found]

    return run


def test_only_gradients_and_parameters_move(collectives, tiny):
    """Slicing a sharded batch would need permutes or all-to-alls; so would activations sharded as parameters are."""
    data, fsdp = collectives(tiny(REFERENCE), tiny(REFERENCE | {"train.fsdp": 2}))
    assert set(data) == {"all-reduce"}
    assert set(fsdp) <= {"all-reduce", "all-gather", "reduce-scatter"}
    assert fsdp["all-gather"] <= 3 * 25  # each parameter, for the forward pass, for the JVP and for the backward pass


@pytest.mark.slow
def test_only_gradients_move_in_other_methods(collectives, tiny, tiny_improved, tiny_decoupled, tiny_rectified):
    rectified = RECTIFIED | tiny_rectified | {"method.stage1_steps": 0}
    for found in collectives(tiny(IMPROVED | tiny_improved), tiny(DECOUPLED | tiny_decoupled), tiny(rectified)):
        assert set(found) == {"all-reduce"}
