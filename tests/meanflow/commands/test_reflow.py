"""Flags of the reflow commands that do not go together are refused, each by name."""

import numpy as np
import pytest
import tiny
from absl import flags

from meanflow.commands import reflow
from meanflow.config.workdir import open_workdir
from meanflow.data import digests
from meanflow.errors import UserError

FLOW = {"method.name": "flow"}
GUIDE = ("--guide=b.safetensors", "--guidance=2", "--guide_config=configs/digits.py:flow")


@pytest.fixture
def given(parse_flags, monkeypatch, datasets_dir):
    """Return a function (*argv, changes) that parses flags beside those of a flow model; changes are to its config."""

    def give(*argv, changes=()):
        config = tiny.compose(FLOW | {"data.dir": datasets_dir} | dict(changes))
        monkeypatch.setattr(reflow, "config_flag", lambda: config)
        monkeypatch.setattr("sys.argv", ["program", *argv])  # where overrides of a config are looked up
        parse_flags(reflow.define_flags, "--teacher=a.safetensors", *argv)

    return give


def test_teacher_and_guide(given):
    given(*GUIDE, "--guide_config.model.width=64")
    assert [config.model.width for config in reflow.read_configs()] == [128, 64]


def test_guidance_without_a_guide(given):
    given("--guidance=2")
    assert [config.model.width for config in reflow.read_configs()] == [128]


def test_a_work_directory_has_its_own_config(given, tmp_path, monkeypatch):
    config = tiny.compose(FLOW | {"model.width": 32, "train.ema_decays": (0.9, 0.99, 0.999)})
    open_workdir(tmp_path, config, "jax")
    given(f"--teacher={tmp_path}", "--ema=2")
    with pytest.raises(UserError, match=f"--config goes with a .safetensors: --teacher {tmp_path} is a work directory"):
        reflow.read_configs()
    monkeypatch.setattr(reflow, "config_flag", lambda: None)
    (teacher,) = reflow.read_configs()
    assert (teacher.model.width, teacher.sample.ema) == (32, 2)
    given(f"--teacher={tmp_path}", "--ema=3")
    monkeypatch.setattr(reflow, "config_flag", lambda: None)
    with pytest.raises(UserError, match="config.sample.ema is 3, but there are 3"):
        reflow.read_configs()


@pytest.mark.parametrize(
    ("argv", "changes", "words"),
    [
        (["--teacher="], {}, "--teacher is missing"),
        (["--guide=b"], {}, "--guide has no effect with --guidance=1"),
        (
            (*GUIDE, "--guide_config.model.compute_dtype=float64"),
            {},
            "either both or neither",
        ),
        (GUIDE[1:], {}, "--guide_config is the config of a --guide, which is missing"),
        (GUIDE[:2], {}, "--guide b.safetensors is not a work directory, .* its config: --guide_config"),
        (
            [*GUIDE[:2], "--guide_config=configs/digits.py"],
            {},
            "--guide b.safetensors has config.method.name meanflow: couplings need a flow model",
        ),
        (GUIDE, {"model.num_classes": 7}, "--guide b.safetensors has config.model.num_classes 10, .* 7: "),
        (["--ema=0"], {}, "--ema selects weights of a work directory, and --teacher a.safetensors is not one"),
        ([], {"method.name": "meanflow"}, "--teacher a.* has .*name meanflow"),
        ([], {"method.path": "cosine"}, "--teacher a.* config.method.path cosine: couplings need the linear path"),
        ([], {"model.width": 30}, "config.model.width"),
    ],
)
def test_models_that_do_not_go_together(argv, changes, words, given):
    given(*argv, changes=changes)
    with pytest.raises(UserError, match=words):
        reflow.read_configs()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--num_samples is missing"),
        (["--num_passes=2"], "--num_passes goes with --labels=dataset, not with --labels=random"),
        (["--labels=dataset", "--num_samples=2"], "--num_samples goes with --labels=random, not with --labels=dataset"),
    ],
)
def test_labels_that_do_not_go_together(argv, words, given):
    given(*argv)
    with pytest.raises(UserError, match=words):
        reflow.make_plan(reflow.read_configs()[0])


def test_a_plan(given):
    given("--num_samples=12", "--seed=4", "--distance_clip=0.87", "--shard_size=3", "--batch_size=2")
    plan = reflow.make_plan(reflow.read_configs()[0])
    assert plan == ((8, 8, 1), 12, 10, 4, None, 0.87, 3, 2)


def test_plans_of_a_dataset(given):
    given("--labels=dataset", "--num_passes=3")
    plan = reflow.make_plan(reflow.read_configs()[0])
    assert (plan.num_samples, len(plan.labels)) == (3 * 1397, 1397)


def test_noise_is_not_that_of_sampling(given):
    given("--num_samples=1")
    config = reflow.read_configs()[0]
    assert reflow.make_plan(config).seed != config.sample.seed


def test_the_digest_is_of_names_shapes_and_values():
    weights = {"a": np.zeros((2, 3), np.float32), "b": np.ones(2)}
    others = [
        weights | {"a": np.zeros((3, 2), np.float32)}, weights | {"b": np.array([1, 2.0])},
        {"a": weights["a"], "c": weights["b"]}, weights | {"a": np.zeros((2, 3), np.int32)},
    ]  # fmt: skip
    assert digests.of_weights(dict(reversed(weights.items()))) == digests.of_weights(weights)
    assert len({digests.of_weights(each) for each in [weights, *others]}) == 5


def test_no_output_or_a_work_directory(given, monkeypatch):
    given("--num_samples=1")
    with pytest.raises(UserError, match="--output is missing"):
        reflow.reflow(None, None, None)
    monkeypatch.setattr(flags.FLAGS["workdir"], "value", "runs/digits")
    with pytest.raises(UserError, match="--workdir is for training and sampling"):
        reflow.read_configs()
