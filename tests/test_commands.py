"""The commands as a user runs them: samples and evaluations of a run, help, and one clear line for each mistake."""

import json
import math

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

TRAIN = {"jax": "jax_impl.main", "torch": "torch_impl/train.py"}
SAMPLE = {"jax": "jax_impl.sample", "torch": "torch_impl/sample.py"}
EVALUATE = {"jax": "jax_impl.evaluate", "torch": "torch_impl/evaluate.py"}
FRAMEWORKS = pytest.mark.parametrize("framework", TRAIN)


@pytest.fixture(scope="module")
def runs(launcher, options, tmp_path_factory):
    """Return {framework: work directory of a tiny run}."""
    directory = tmp_path_factory.mktemp("runs")
    for framework, program in TRAIN.items():
        command = launcher.run(program, *options(), f"--workdir={directory / framework}")
        assert command.wait() == 0, command.stderr
    return {framework: directory / framework for framework in TRAIN}


def samples(launcher, framework, workdir, output, *flags):
    """Run the sample command; return images and labels."""
    command = launcher.run(SAMPLE[framework], f"--workdir={workdir}", f"--output={output}", *flags)
    assert command.wait() == 0, command.stderr
    assert (output / "samples.png").read_bytes().startswith(b"\x89PNG")
    with np.load(output / "samples.npz") as file:
        return file["images"], file["labels"]


class CifarPatches(tfds.core.GeneratorBasedBuilder):
    """Random images with the features of TFDS's cifar10."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = epath.Path(__file__).parent  # TFDS looks it up by itself only for a module inside a package

    def _info(self):
        features = {
            "id": tfds.features.Text(), "image": tfds.features.Image(shape=(32, 32, 3)),
            "label": tfds.features.ClassLabel(num_classes=10),
        }  # fmt: skip
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(40), "test": self._generate_examples(10)}

    def _generate_examples(self, num):
        for i in range(num):
            image = np.random.RandomState(i).randint(256, size=(32, 32, 3), dtype=np.uint8)
            yield i, {"id": f"train_{i:05d}", "image": image, "label": i % 10}


def test_the_published_run_on_images_like_cifar10(launcher, in_both, tmp_path):
    from meanflow.data import sources

    sources.open_source("cifar_patches", "train", str(tmp_path))
    changes = {
        "data.name": tmp_path / "cifar_patches" / "1.0.0", "data.num_workers": 0, "model.width": 4,
        "model.channel_mult": (1,), "model.num_blocks": 1, "model.attn_resolutions": (),
        "train.batch_size": 4, "train.steps": 2,
        "train.log_every": 1, "train.sample_every": 0, "train.compile": False,
        "method.flow_fraction": 1.0,  # without the JVP the graph compiles sooner
    }  # fmt: skip
    options = [f"--config.{name}={value}" for name, value in changes.items()]

    def scenario(framework):
        flags = ("--config=configs/meanflow_cifar10.py:v1", *options, f"--workdir={tmp_path / framework}")
        command = launcher.run(TRAIN[framework], *flags)
        assert command.wait() == 0, command.stderr
        log = [json.loads(line) for line in (tmp_path / framework / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in log] == [1, 2]
        assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in log)
        assert [line["learning_rate"] for line in log] == pytest.approx([1e-8, 1e-8 + (6e-4 - 1e-8) / 10_000])

    in_both(scenario)


@FRAMEWORKS
def test_samples_do_not_depend_on_the_batching(framework, launcher, runs, tmp_path):
    images, labels = samples(launcher, framework, runs[framework], tmp_path / "a", "--num_samples=7", "--labels=1,2,3")
    assert images.shape == (7, 8, 8, 1) and images.dtype == np.float32
    assert labels.tolist() == [1, 2, 3, 1, 2, 3, 1]
    flags = ("--num_samples=7", "--labels=1,2,3", "--batch_size=3")
    again, _ = samples(launcher, framework, runs[framework], tmp_path / "b", *flags)
    np.testing.assert_allclose(again, images, atol=1e-5)
    times, _ = samples(launcher, framework, runs[framework], tmp_path / "c", *flags, "--times=1,0.5,0", "--cfg_scale=2")
    assert np.abs(times - images).max() > 1e-6


@FRAMEWORKS
def test_evaluate_prints_one_json_line_and_keeps_it(framework, launcher, runs):
    command = launcher.run(EVALUATE[framework], f"--workdir={runs[framework]}")
    assert command.wait() == 0, command.stderr
    result = json.loads(command.stdout)
    assert result == json.loads((runs[framework] / "evaluation.json").read_text())
    assert 0 <= result["class_accuracy"] <= 1 and result["frechet_distance_pixels"] > 0


def test_improved_meanflow_is_sampled_and_swept(launcher, options, tiny_improved, in_both, tmp_path):
    def scenario(framework):
        run = tmp_path / framework
        command = launcher.run(TRAIN[framework], *options(tiny_improved), f"--workdir={run}")
        assert command.wait() == 0, command.stderr
        told = [
            samples(launcher, framework, run, tmp_path / f"{framework}_{i}", "--num_samples=7", *flags)[0]
            for i, flags in enumerate([(), ("--omega=4", "--interval=0.4,0.65")])
        ]
        assert told[0].shape == (7, 8, 8, 1) and (told[0] != told[1]).any()
        flags = (f"--workdir={run}", "--num_samples=12", "--omegas=1,4", "--intervals=0:1,0.4:0.65")
        command = launcher.run(EVALUATE[framework], *flags)
        assert command.wait() == 0, command.stderr
        rows = json.loads((run / "sweep.json").read_text())
        pairs = [(1, [0, 1]), (4, [0, 1]), (1, [0.4, 0.65]), (4, [0.4, 0.65])]
        assert [(row["omega"], row["interval"]) for row in rows] == pairs
        assert len({row["frechet_distance_pixels"] for row in rows}) == 4
        assert {row["num_samples"] for row in rows} == {12}
        assert 0.9 < rows[0]["real_class_accuracy"] == rows[3]["real_class_accuracy"]
        assert command.stdout.startswith("| omega |") and "best frechet_distance_pixels: " in command.stdout
        assert (run / "sweep.html").read_text().count("<img") == 2 and not (run / "evaluation.json").exists()

    in_both(scenario)


@pytest.mark.parametrize(
    ("programs", "flags"),
    [(TRAIN, ()), (SAMPLE, ("--omega", "--steps", "--labels")), (EVALUATE, ("--omegas", "--steps"))],
)
def test_help(programs, flags, launcher):
    for program in programs.values():
        command = launcher.run(program, "--help")
        assert command.wait() == 0, command.stderr
        shown = {line.split(":")[0].strip() for line in command.stdout.splitlines()}
        assert {"--workdir", *flags} <= shown
        assert ("--steps" in shown) == (programs is not TRAIN)


@FRAMEWORKS
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.batch_size": 15, "train.accumulate": 2}, "batch_size 15 is not divisible by 2"),
        ({"model.num_classes": 5}, "outside [0, 5)"),
        ({"model.input_size": 16}, "the model expects (16, 16, 1)"),
        ({"train.load_from": "/none.safetensors"}, "there is no /none.safetensors"),
    ],
)
def test_mistakes_of_training(framework, changes, message, refused, options, tmp_path):
    assert message in refused(TRAIN[framework], *options(changes), f"--workdir={tmp_path / 'run'}")


@FRAMEWORKS
def test_a_network_that_can_only_sample_is_not_trained(framework, refused, options, tiny_improved, tmp_path):
    changes = tiny_improved | {"model.v_heads": False}
    message = refused(TRAIN[framework], *options(changes), f"--workdir={tmp_path / 'run'}")
    assert "can sample but not be trained" in message and not (tmp_path / "run").exists()


@FRAMEWORKS
def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(framework, launcher, options, tmp_path):
    changes = {"train.learning_rate": 1e30, "train.steps": 50, "train.checkpoint_every": 1, "train.warmup_steps": 40,
               "train.warmup_from": 1e-4}  # fmt: skip
    command = launcher.run(TRAIN[framework], *options(changes), f"--workdir={tmp_path}")
    assert command.wait() == 2, command.stderr
    assert command.stderr.splitlines()[-1].startswith("error: the loss of step ")
    assert "Traceback" not in command.stderr
    assert any((tmp_path / "checkpoints" / framework).iterdir())


@FRAMEWORKS
def test_a_workdir_that_cannot_be_written(framework, refused, options, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(TRAIN[framework], *options(), f"--workdir={tmp_path / 'file' / 'run'}")


@FRAMEWORKS
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--times=0.5,1",), "must fall"),
        (("--ema=7",), "config.sample.ema is 7"),
        (("--labels=a",), "--labels"),
        (("--labels=11",), "label 11 is outside the classes 0 to 9"),
        (("--omega=2",), "--omega is for networks conditioned on guidance"),
    ],
)
def test_mistakes_of_sampling(framework, flags, message, refused, runs, tmp_path):
    assert message in refused(SAMPLE[framework], f"--workdir={runs[framework]}", f"--output={tmp_path}", *flags)


# A mistake in each command, and what the line on it names; {tmp} is an empty directory.
FLOW = ("--config=configs/digits.py:flow",)
MISTAKES = {
    "train": (("--config=configs/digits.py", "--config.data.name=digitz", "--workdir={tmp}/run"), "digitz"),
    "sample": (("--workdir={tmp}",), "{tmp} is not the work directory of a run"),
    "evaluate": (("--workdir={tmp}",), "{tmp} is not the work directory of a run"),
    "encode": (("--source={tmp}/none", "--dest={tmp}/latents"), "{tmp}/none"),
    "reflow": ((*FLOW, "--teacher={tmp}/none.safetensors", "--output={tmp}/pairs", "--num_samples=8"),
               "there is no {tmp}/none.safetensors"),
    "time_embedding": (("--config=configs/digits.py:edm2_flow", "--teacher={tmp}/none.safetensors",
                        "--output={tmp}/start.safetensors"), "there is no {tmp}/none.safetensors"),
}  # fmt: skip


@FRAMEWORKS
@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(framework, command, launcher, tmp_path):
    program = TRAIN["torch"].replace("train", command) if framework == "torch" else f"jax_impl.{command}"
    program = TRAIN[framework] if command == "train" else program
    flags, message = MISTAKES[command]
    done = launcher.run(program, *(flag.format(tmp=tmp_path) for flag in flags))
    assert done.wait() == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and message.format(tmp=tmp_path) in last, last
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())
