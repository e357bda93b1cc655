"""Couplings of a flow model as a user makes them: by either framework, any number of processes, and after a kill."""

import json
import signal

import numpy as np
import pytest

from meanflow.config import checks
from meanflow.config.features import Feature
from meanflow.data import sources

REFLOW = {"jax": "jax_impl.reflow", "torch": "torch_impl/reflow.py"}
FRAMEWORKS = pytest.mark.parametrize("framework", REFLOW)
SIZES = ("--num_samples=298", "--shard_size=5", "--batch_size=4", "--steps=6")
SHARDS = 60
BOUND = 2e-3  # of pixels, of which the largest are 6
NOISE = Feature("noise", (8, 8, 1), np.floating, "")


@pytest.fixture(scope="module")
def flow(tiny, tiny_flow):
    """Return a function (changes) -> the config of a tiny flow model."""
    return lambda changes=(): checks.check(tiny(tiny_flow | {"train.matmul_precision": "highest"} | dict(changes)))


@pytest.fixture(scope="module")
def models(flow, tmp_path_factory):
    """Return a directory with canonical weights of a teacher and of a narrower guide, zero nowhere."""
    from torch_impl import step, weights

    directory = tmp_path_factory.mktemp("models")
    for seed, (name, changes) in enumerate({"teacher": {}, "guide": {"model.width": 8}}.items()):
        net, rng = step.build_net(flow(changes)), np.random.default_rng(seed)
        canonical = weights.to_canonical(net, dict(net.named_parameters()))
        for key in sorted(canonical.keys() - net.tables().keys()):  # a set has another order in every process
            canonical[key] = (canonical[key] + rng.normal(0, 0.3, canonical[key].shape)).astype(np.float32)
        weights.save(directory / f"{name}.safetensors", canonical, {"source": "a test"})
    return directory


@pytest.fixture(scope="module")
def teacher(models, options, tiny_flow):
    """Return the flags of the teacher, as a file."""
    return [f"--teacher={models / 'teacher.safetensors'}", *options(tiny_flow | {"train.matmul_precision": "highest"})]


@pytest.fixture(scope="module")
def made(launcher, teacher, models, in_both, tmp_path_factory):
    """Return the directory with the couplings that each framework made, by name of the run."""
    directory = tmp_path_factory.mktemp("couplings")
    guide = ("--guidance=1.5", f"--guide={models / 'guide.safetensors'}", "--guide_config=configs/digits.py:flow",
             "--guide_config.model.width=8", "--guide_config.model.depth=1", "--guide_config.model.num_heads=2",
    )  # fmt: skip
    runs = {"plain": (), "guided": guide}

    def scenario(framework):
        for name, flags in runs.items():
            command = launcher.run(REFLOW[framework], *teacher, *SIZES, *flags, output(directory / framework / name))
            assert command.wait() == 0, command.stderr
            assert command.stdout == f"{directory / framework / name}\n"

    in_both(scenario)
    return directory


def output(directory):
    return f"--output={directory}"


def read(directory):
    """Return the images, noises and labels of couplings."""
    source = sources.open_source(str(directory), "train", "", NOISE)
    pairs = [source[i] for i in range(len(source))]
    return tuple(np.array([pair[key] for pair in pairs]) for key in ("image", "noise", "label"))


def shards(directory):
    return {path.name: path.read_bytes() for path in directory.glob("couplings*")}


def test_both_frameworks_make_the_same_pairs(made):
    """In float32, where errors grow from the noise of level 80 on."""
    found = {}
    for name in ("plain", "guided"):
        (images, noise, labels), (images_torch, noise_torch, labels_torch) = (
            read(made / framework / name) for framework in REFLOW
        )
        assert images.shape == noise.shape == (298, 8, 8, 1)
        np.testing.assert_array_equal(noise, noise_torch)
        np.testing.assert_array_equal(labels, labels_torch)
        np.testing.assert_allclose(images, images_torch, rtol=0, atol=BOUND)
        found[name] = images
    assert np.abs(found["plain"] - found["guided"]).max() > 100 * BOUND


@pytest.mark.slow
@FRAMEWORKS
def test_two_processes_make_the_files_of_one(framework, launcher, teacher, made, tmp_path):
    for command in launcher.start_two(framework, REFLOW[framework], *teacher, *SIZES, output(tmp_path)):
        assert command.wait() == 0, command.stderr
    assert shards(tmp_path) == shards(made / framework / "plain")
    assert len(read(tmp_path)[0]) == 298


@pytest.mark.slow
def test_goes_on_after_a_kill(launcher, teacher, made, in_both, tmp_path):
    def scenario(framework):
        directory = tmp_path / framework
        killed = launcher.start(REFLOW[framework], *teacher, *SIZES, output(directory))
        killed.wait_for(directory / f"couplings-train.array_record-00003-of-000{SHARDS}")
        killed.send(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
        before = shards(directory)
        assert 4 <= len(before) < SHARDS and not (directory / "features.json").exists()
        again = launcher.run(REFLOW[framework], *teacher, *SIZES, output(directory))
        assert again.wait() == 0, again.stderr
        assert again.stderr.count("array_record") == SHARDS - len(before)  # no shard is made twice
        assert shards(directory) == shards(made / framework / "plain")
        assert not [path for path in directory.iterdir() if path.name.startswith(".couplings")]

    in_both(scenario)


@pytest.mark.slow
def test_nobody_waits_for_a_process_that_died(launcher, teacher, tmp_path):
    """What it left is named."""
    first, second = launcher.start_two("jax", REFLOW["jax"], *teacher, *SIZES, output(tmp_path))
    second.wait_for(tmp_path / f"couplings-train.array_record-00001-of-000{SHARDS}")
    second.send(signal.SIGKILL)
    assert (second.wait(), first.wait()) == (-signal.SIGKILL, 0), first.stderr
    assert f"{tmp_path} misses " in first.stderr and "run the command again" in first.stderr and not first.stdout
    assert SHARDS // 2 < len(shards(tmp_path)) < SHARDS


def test_a_work_directory_makes_the_same_pairs_of_the_same_weights(launcher, flow, models, made, tmp_path):
    from saved import write_run

    from torch_impl import weights

    run = tmp_path / "run"
    write_run("torch", run, flow(), weights.load(models / "teacher.safetensors"))
    command = launcher.run(REFLOW["torch"], f"--teacher={run}", "--ema=-1", *SIZES, output(tmp_path / "made"))
    assert command.wait() == 0, command.stderr
    assert shards(tmp_path / "made") == shards(made / "torch" / "plain")
    metadata = json.loads((tmp_path / "made" / "metadata.json").read_text())
    assert metadata == {"teacher": str(run), "guide": ""}


def test_the_labels_of_a_dataset(launcher, teacher, flow, tmp_path):
    """Each once in every pass."""
    passes = ("--labels=dataset", "--num_passes=2", "--shard_size=1000", "--batch_size=200", "--steps=1")
    command = launcher.run(REFLOW["torch"], *teacher, *passes, output(tmp_path))
    assert command.wait() == 0, command.stderr
    source = sources.open_labels("digits", "train", flow().data.dir)
    assert read(tmp_path)[2].tolist() == 2 * [source[i] for i in range(len(source))]


@pytest.mark.slow
def test_devices_share_a_batch(launcher, teacher, made, tmp_path):
    commands = [
        launcher.start(REFLOW["jax"], *teacher, *SIZES, f"--cpu_devices={num}", output(tmp_path / str(num)))
        for num in (2, 3)
    ]
    assert commands[0].wait() == 0, commands[0].stderr
    np.testing.assert_allclose(read(tmp_path / "2")[0], read(made / "jax" / "plain")[0], rtol=0, atol=BOUND)
    assert commands[1].wait() == 2 and "--batch_size 4 is not divisible by the 3 devices" in commands[1].stderr


def test_other_settings(refused, teacher, made):
    directory = made / "torch" / "plain"
    before = shards(directory)
    message = refused(REFLOW["torch"], *teacher, *SIZES, "--steps=4", "--seed=5", output(directory))
    assert "begun with other settings: steps (6 there, 4 here), seed (1 there, 5 here)" in message
    assert shards(directory) == before


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--sigma_min=90", "0 < --sigma_min < --sigma_max"),
        ("--config.model.mlp_ratio=2", "this network has config.model.mlp_ratio 2.0"),
        ("--guide_config=none.py", "there is no config file none.py"),
    ],
)
def test_mistakes(flag, message, refused, teacher, tmp_path):
    assert message in refused(REFLOW["torch"], *teacher, *SIZES, output(tmp_path / "a"), flag)
    assert not (tmp_path / "a").exists()
