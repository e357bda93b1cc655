"""From a folder of photographs to latents, a trained model, decoded samples and their metrics, as a user goes."""

import json
import signal

import make_parts
import numpy as np
import PIL.Image
import pytest

from meanflow.config import latents
from meanflow.config.workdir import read_workdir
from meanflow.data.latents.dataset import read_metadata

ENCODE = {"jax": "jax_impl.encode", "torch": "torch_impl/encode.py"}
TRAIN = {"jax": "jax_impl.main", "torch": "torch_impl/train.py"}
SAMPLE = {"jax": "jax_impl.sample", "torch": "torch_impl/sample.py"}
EVALUATE = {"jax": "jax_impl.evaluate", "torch": "torch_impl/evaluate.py"}
FRAMEWORKS = pytest.mark.parametrize("framework", ENCODE)
NUM = 12  # samples judged
VALUES = {"fid", "inception_score", "inception_score_std", "kid", "kid_std", "precision", "recall"}
TRAINING = {
    "model.input_size": 8, "model.channels": 4, "model.num_classes": 5, "train.steps": 20, "train.batch_size": 16,
    "train.sample_every": 20, "evaluation.classifier": False, "data.flip": True, "evaluation.num_samples": NUM,
    "train.evaluate_every": 20, "evaluation.metrics": ("is",),
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Return a directory with 60 photographs, an autoencoder and weights of Inception."""
    directory = tmp_path_factory.mktemp("parts")
    make_parts.photographs(directory / "photographs")
    make_parts.autoencoder(directory / "vae")
    make_parts.inception(directory / "inception.safetensors")
    return directory


@pytest.fixture(scope="module")
def source(parts):
    """Return the flags of the encode commands but for --dest."""
    sizes = ("--image_size=32", "--shard_size=4", "--batch_size=3")
    return (f"--source={parts / 'photographs'}", f"--vae={parts / 'vae'}", *sizes)


@pytest.fixture(scope="module")
def runs(launcher, source, parts, options, in_both, tmp_path_factory):
    """Return the directory of all that both frameworks made, and what evaluate printed."""
    directory = tmp_path_factory.mktemp("latents")
    weights = str(parts / "inception.safetensors")
    inception = f"--inception={weights}"

    def scenario(framework):
        own = directory / framework
        paths = {"data.name": str(own / "latents"), "evaluation.inception": weights}
        steps = [
            lambda: launcher.start(ENCODE[framework], *source, f"--dest={own / 'latents'}"),
            lambda: launcher.start(
                TRAIN[framework], *options(TRAINING | paths), f"--workdir={own / 'run'}"
            ),
            lambda: launcher.start(SAMPLE[framework], f"--workdir={own / 'run'}", "--num_samples=9", "--save=png"),
            lambda: launcher.start(
                EVALUATE[framework], f"--make_reference={parts / 'photographs' / 'coffee'}", "--metrics=fid,kid,pr",
                "--image_size=32", f"--reference={own / 'real.npz'}", inception,
            ),
            lambda: launcher.start(
                EVALUATE[framework], f"--workdir={own / 'run'}", "--metrics=fid,is,kid,pr", inception,
                f"--reference={own / 'real.npz'}", "--save=npz",
            ),
        ]  # fmt: skip
        for step in steps:
            command = step()
            assert command.wait() == 0, command.stderr
        return json.loads(command.stdout)

    return directory, in_both(scenario)


@FRAMEWORKS
def test_the_dataset_says_what_it_is(runs, parts, framework):
    metadata = read_metadata(str(runs[0] / framework / "latents"))
    assert metadata and metadata["vae"] == str(parts / "vae") and metadata["num_images"] == 60
    assert latents.from_dict(metadata["convention"]) == latents.CONVENTIONS["sd"]


@FRAMEWORKS
def test_the_run_keeps_the_convention(runs, parts, framework):
    config = read_workdir(runs[0] / framework / "run")
    assert latents.of(config) == latents.CONVENTIONS["sd"] and config.latents.vae == str(parts / "vae")


@FRAMEWORKS
def test_a_run_judges_itself(runs, framework):
    """By the metrics of its config, on decoded samples; evaluate has the same of the same samples."""
    lines = (runs[0] / framework / "run" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert (last["step"], last["num_samples"]) == (20, NUM)
    assert last["inception_score"] == pytest.approx(runs[1][framework]["inception_score"], rel=1e-6)


@FRAMEWORKS
def test_samples_are_decoded(runs, framework):
    directory = runs[0] / framework / "run" / "samples"
    with np.load(directory / "samples.npz") as file:
        assert file["images"].shape == (9, 32, 32, 3) and file["latents"].shape == (9, 8, 8, 4)
        labels = file["labels"].tolist()
        first = np.clip(np.rint((file["images"][0] + 1) * 127.5), 0, 255)
    pairs = json.loads((directory / "dataset.json").read_text())["labels"]
    assert pairs == [[f"{i:06d}.png", labels[i]] for i in range(9)]
    np.testing.assert_array_equal(PIL.Image.open(directory / "000000.png"), first)


@FRAMEWORKS
def test_metrics_are_printed_and_kept(runs, framework):
    result, run = runs[1][framework], runs[0] / framework / "run"
    assert set(result) == VALUES | {"num_samples", "convention", "reference"}
    assert result["num_samples"] == NUM and result["convention"] == "torch_fidelity"
    assert all(np.isfinite(result[name]) for name in VALUES) and result["fid"] > 0
    assert json.loads((run / "evaluation.json").read_text()) == result
    assert (run / "evaluation.png").exists()
    with np.load(run / "evaluation" / "samples_uint8.npz") as file:
        assert file["arr_0"].shape == (NUM, 32, 32, 3) and file["arr_0"].dtype == np.uint8
        assert file["arr_1"].shape == (NUM,)


@pytest.mark.slow
def test_both_give_the_same_samples_the_same_values(launcher, runs, parts):
    """Of the samples of JAX, each with the reference that it made itself."""
    judged = {}
    commands = {
        framework: launcher.start(
            EVALUATE[framework], f"--samples={runs[0] / 'jax' / 'run' / 'evaluation' / 'samples_uint8.npz'}",
            "--metrics=fid,is,kid,pr", f"--inception={parts / 'inception.safetensors'}",
            f"--reference={runs[0] / framework / 'real.npz'}",
        )
        for framework in EVALUATE
    }  # fmt: skip
    for framework, command in commands.items():
        assert command.wait() == 0, command.stderr
        judged[framework] = json.loads(command.stdout)
    for name in VALUES:
        assert judged["torch"][name] == pytest.approx(judged["jax"][name], rel=1e-4, abs=0), name
        assert judged["jax"][name] == pytest.approx(runs[1]["jax"][name], rel=1e-6), name


@pytest.mark.slow
@FRAMEWORKS
def test_two_processes_write_the_same_bytes(launcher, runs, source, tmp_path, framework):
    for command in launcher.start_two(framework, ENCODE[framework], *source, f"--dest={tmp_path / 'two'}"):
        assert command.wait() == 0, command.stderr
    assert contents(tmp_path / "two") == contents(runs[0] / framework / "latents")


@pytest.mark.slow
@FRAMEWORKS
def test_after_a_kill_the_same_bytes(launcher, runs, source, tmp_path, framework):
    dest = tmp_path / "killed"
    killed = launcher.start(ENCODE[framework], *source, f"--dest={dest}")
    killed.wait_for(dest / "latents-train.array_record-00001-of-00015")
    killed.send(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert 2 <= len(list(dest.glob("*-of-00015"))) < 15 and not (dest / "features.json").exists()
    again = launcher.run(ENCODE[framework], *source, f"--dest={dest}")
    assert again.wait() == 0, again.stderr
    assert contents(dest) == contents(runs[0] / framework / "latents")


@pytest.mark.slow
@FRAMEWORKS
def test_two_processes_judge_as_one(launcher, runs, parts, framework):
    """The same samples in the same order; sums differ by rounding alone."""
    own = runs[0] / framework

    command = (
        EVALUATE[framework], f"--workdir={own / 'run'}", "--metrics=fid,is", f"--reference={own / 'real.npz'}",
        f"--inception={parts / 'inception.safetensors'}", "--batch_size=5",
    )  # fmt: skip
    first, other = launcher.start_two(framework, *command)
    assert first.wait() == 0, first.stderr
    assert other.wait() == 0 and "fid" not in other.stdout, other.stderr
    result = json.loads(first.stdout.splitlines()[-1])  # Gloo greets before
    for name in ("fid", "inception_score"):
        assert result[name] == pytest.approx(runs[1][framework][name], rel=1e-5)


def contents(directory):
    """Return {name: bytes} of all files."""
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
