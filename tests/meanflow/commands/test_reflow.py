"""Flags of the reflow commands that do not go together are refused, each by name."""

import importlib
import pathlib

import numpy as np
import pytest
import tiny
import torch
from absl import flags

from meanflow.commands import reflow
from meanflow.config import checks
from meanflow.config.workdir import open_workdir
from meanflow.data import digests
from meanflow.errors import UserError
from meanflow.sampling import edm
from meanflow.weights import fitting, reading
from parity import check
from parity.golden import fixtures

FLOW = {"method.name": "flow"}
OFFICIAL_GUIDANCE = 1.7
GUIDE = ("--guide=b.safetensors", "--guidance=2", "--guide_config=configs/digits.py:flow")


READ = reading.network


def network(source, config=None, choice=reading.FIRST):
    """Stand in for `reading.network` where the config says everything."""
    if config is None:
        return READ(source, config, choice)
    return reading.Network(checks.check(config), {}, "weights", False)


def read_configs():
    return [model.config for model in reflow.read_models()]


@pytest.fixture
def given(parse_flags, monkeypatch, datasets_dir):
    """Return a function (*argv, changes) that parses flags beside those of a flow model; changes are to its config."""

    def give(*argv, changes=()):
        config = tiny.compose(FLOW | {"data.dir": datasets_dir} | dict(changes))
        monkeypatch.setattr(reflow, "config_flag", lambda: config)
        monkeypatch.setattr(reflow.reading, "network", network)
        monkeypatch.setattr("sys.argv", ["program", *argv])  # where overrides of a config are looked up
        parse_flags(reflow.define_flags, "--teacher=a.safetensors", *argv)

    return give


def test_teacher_and_guide(given):
    given(*GUIDE, "--guide_config.model.width=64")
    assert [config.model.width for config in read_configs()] == [128, 64]


def test_guidance_without_a_guide(given):
    given("--guidance=2")
    assert [config.model.width for config in read_configs()] == [128]


def test_a_work_directory_has_its_own_config(given, tmp_path, monkeypatch):
    config = tiny.compose(FLOW | {"model.width": 32, "train.ema_decays": (0.9, 0.99, 0.999)})
    open_workdir(tmp_path, config, "jax")
    (tmp_path / "checkpoints").mkdir()
    given(f"--teacher={tmp_path}", "--ema=2")
    with pytest.raises(UserError, match=f"--config goes with other weights: --teacher {tmp_path} is a work directory"):
        read_configs()
    monkeypatch.setattr(reflow, "config_flag", lambda: None)
    (teacher,) = read_configs()
    assert (teacher.model.width, teacher.sample.ema) == (32, 2)
    given(f"--teacher={tmp_path}", "--ema=3")
    monkeypatch.setattr(reflow, "config_flag", lambda: None)
    with pytest.raises(UserError, match="config.sample.ema is 3, but there are 3"):
        read_configs()


def test_the_time_of_a_run_is_ours(given, tmp_path, monkeypatch):
    open_workdir(tmp_path, tiny.compose(FLOW), "jax")
    (tmp_path / "snapshots").mkdir()
    given(f"--teacher={tmp_path}", "--time=reversed")
    monkeypatch.setattr(reflow, "config_flag", lambda: None)
    with pytest.raises(UserError, match=f"--time goes with other weights: --teacher {tmp_path}"):
        read_configs()


def official(path):
    """Write an official SiT of REPA under two entries, of which the second has twice the weights."""
    weights = fixtures.Fixture(check.GOLDEN / "dmf_sit_torch.npz").under("param/")
    net = {n: torch.from_numpy(np.array(a)) for n, a in weights.items() if not n.startswith("projectors.")}
    torch.save({"ema": net, "model": {n: a if n == "pos_embed" else 2 * a for n, a in net.items()}}, path)
    return weights["t_embedder.mlp.0.bias"]


def test_an_official_file_needs_no_config(given, tmp_path, monkeypatch):
    """Its weights show the network, --ema chooses among them; what data they have seen they do not show."""
    bias = official(tmp_path / "sit.pt")
    monkeypatch.setitem(fitting.DIT_SIZES, "tiny", {"depth": 3, "width": 32, "num_heads": 4})

    def give(*argv):
        given(f"--teacher={tmp_path / 'sit.pt'}", *argv)
        monkeypatch.setattr(reflow, "config_flag", lambda: None)

    for flag, factor in (((), 1), (("--ema=-1",), 2)):
        give("--num_samples=3", *flag)
        (teacher,) = reflow.read_models()
        assert (teacher.config.method.name, teacher.config.model.num_heads, teacher.published) == ("flow", 4, True)
        np.testing.assert_array_equal(teacher.weights["t_embedder.mlp.0.bias"], factor * bias)
        assert reflow.make_plan(teacher).shape == (8, 8, 4)


def test_weights_do_not_say_what_data_they_have_seen(given, tmp_path, monkeypatch):
    official(tmp_path / "sit.pt")
    monkeypatch.setitem(fitting.DIT_SIZES, "tiny", {"depth": 3, "width": 32, "num_heads": 4})
    given(f"--teacher={tmp_path / 'sit.pt'}", "--labels=dataset")
    monkeypatch.setattr(reflow, "config_flag", lambda: None)
    with pytest.raises(UserError, match="sit.pt does not say what data it has seen: give --config"):
        reflow.make_plan(reflow.read_models()[0])


def test_a_directory_among_distributed_processes(given, tmp_path):
    given(f"--teacher={tmp_path}")
    defined = flags.FlagValues()
    flags.DEFINE_bool("distributed", False, "", flag_values=defined)
    flags.FLAGS.append_flag_values(defined)
    try:
        flags.FLAGS(["program", f"--teacher={tmp_path}", "--distributed"])
        with pytest.raises(UserError, match="is a directory, which --distributed processes cannot read"):
            read_configs()
    finally:
        flags.FLAGS.remove_flag_values(defined)


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
        (GUIDE[:2], {}, "there is no b.safetensors"),
        (
            [*GUIDE[:2], "--guide_config=configs/digits.py"],
            {},
            "--guide b.safetensors has config.method.name meanflow: couplings need a flow model",
        ),
        (GUIDE, {"model.num_classes": 7}, "--guide b.safetensors has config.model.num_classes 10, .* 7: "),
        ([], {"method.name": "meanflow"}, "--teacher a.* has .*name meanflow"),
        ([], {"method.path": "cosine"}, "--teacher a.* config.method.path cosine: couplings need the linear path"),
        ([], {"model.width": 30}, "config.model.width"),
    ],
)
def test_models_that_do_not_go_together(argv, changes, words, given):
    given(*argv, changes=changes)
    with pytest.raises(UserError, match=words):
        read_configs()


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
        reflow.make_plan(reflow.read_models()[0])


def test_a_plan(given):
    given("--num_samples=12", "--seed=4", "--distance_clip=0.87", "--shard_size=3", "--batch_size=2")
    plan = reflow.make_plan(reflow.read_models()[0])
    assert plan == ((8, 8, 1), 12, 10, 4, None, 0.87, 3, 2)


def test_plans_of_a_dataset(given):
    given("--labels=dataset", "--num_passes=3")
    plan = reflow.make_plan(reflow.read_models()[0])
    assert (plan.num_samples, len(plan.labels)) == (3 * 1397, 1397)


def test_noise_is_not_that_of_sampling(given):
    given("--num_samples=1")
    (teacher,) = reflow.read_models()
    assert reflow.make_plan(teacher).seed != teacher.config.sample.seed


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
        read_configs()


@pytest.mark.parametrize("framework", [pytest.param("jax", marks=pytest.mark.slow), "torch"])
@pytest.mark.parametrize("guidance", [1.0, OFFICIAL_GUIDANCE])
def test_official_files_make_the_official_couplings(framework, guidance, given, tmp_path, monkeypatch):
    """EDM2's networks under `net`, without a config, and couplings that the official reflow.py made of them."""
    fixture = fixtures.Fixture(check.GOLDEN / "edm2_reflow_torch.npz")
    for name, prefix in (("net", "param/"), ("gnet", "param_gnet/")):
        weights = {n: torch.from_numpy(np.array(a)) for n, a in fixture.under(prefix).items()}
        torch.save({"net": weights}, tmp_path / f"{name}.pt")
    guide = [f"--guide={tmp_path / 'gnet.pt'}", f"--guidance={guidance}"] if guidance != 1 else []
    given(f"--teacher={tmp_path / 'net.pt'}", "--num_samples=3", *guide)
    monkeypatch.setattr(reflow, "config_flag", lambda: None)
    heads = {"net.pt": 16, "gnet.pt": 8}  # published networks have 64 channels per head, these small ones do not
    monkeypatch.setattr(
        reading, "network", lambda *given: READ(*given, model={"head_width": heads[pathlib.Path(given[0]).name]})
    )
    models = [model[:2] for model in reflow.read_models()]
    sigmas = edm.noise_levels(edm.Schedule(4, 0.002, 80.0, 7.0))
    coupler = importlib.import_module(f"{framework}_impl.reflow").make_coupler(models, sigmas, guidance)
    noise = np.ascontiguousarray(fixture.get("in/sample/noise").transpose(0, 2, 3, 1))
    expected = fixture.get("out/sample/heun4" if guide else "out/sample/heun4_noguid").transpose(0, 2, 3, 1)
    found = coupler(noise, fixture.get("in/sample/y").astype(np.int32))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
