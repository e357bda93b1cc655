"""A flow model, decoupled MeanFlow from it, guidance by it, and samples of all, as a user runs the commands."""

import importlib
import json
import math
import shutil

import numpy as np
import pytest

TRAIN = {"jax": "jax_impl.main", "torch": "torch_impl/train.py"}
SAMPLE = {"jax": "jax_impl.sample", "torch": "torch_impl/sample.py"}
FRAMEWORKS = pytest.mark.parametrize("framework", TRAIN)
STEPS = {"flow": 3, "dmf": 3, "distilled": 2}
RATE = 1e-3


@pytest.fixture(scope="module")
def runs(launcher, options, tiny_flow, tiny_decoupled, in_both, tmp_path_factory):
    """Return {framework: {name of the run: (work directory, what it wrote to stderr)}}."""
    directory, done = tmp_path_factory.mktemp("runs"), {framework: {} for framework in TRAIN}

    def scenario(framework):
        def train(name, changes):
            run = directory / framework / name
            changes = changes | {"train.steps": STEPS[name]}
            command = launcher.run(TRAIN[framework], *options(changes), f"--workdir={run}")
            assert command.wait() == 0, command.stderr
            done[framework][name] = (run, command.stderr)
            return run

        flow = train("flow", tiny_flow | {"train.learning_rate": 50 * RATE})
        train("dmf", tiny_decoupled | {"train.load_from": flow, "train.learning_rate": RATE})
        file = directory / f"{framework}.safetensors"
        of(framework, "weights").save(file, read(framework, flow, 0), {})
        by_teacher = {"method.guidance_type": "distill", "method.teacher": flow, "train.load_from": file}
        train("distilled", tiny_decoupled | by_teacher)

    in_both(scenario)
    return done


def of(framework, module):
    return importlib.import_module(f"{framework}_impl.{module}")


def read(framework, run, ema):
    """Return the canonical weights of a run."""
    return of(framework, "checkpoints").read_weights(str(run), ema)[1]


def sample(launcher, framework, run, output, *flags):
    command = launcher.run(SAMPLE[framework], f"--workdir={run}", f"--output={output}", "--num_samples=7", *flags)
    assert command.wait() == 0, command.stderr
    with np.load(output / "samples.npz") as file:
        return file["images"]


def distance(a, b, names):
    return max(float(np.abs(a[name] - b[name]).max()) for name in names)


@FRAMEWORKS
@pytest.mark.parametrize("name", STEPS)
def test_every_run_trains(framework, name, runs):
    log = [json.loads(line) for line in (runs[framework][name][0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, STEPS[name] + 1))
    for line in log:
        assert all(math.isfinite(value) for value in line.values()) and line["grad_norm"] > 0
        assert {"raw_error_flow_rows", "raw_error_jvp_rows", "du_dt_norm"} <= line.keys() or name == "flow"
        assert line["raw_error"] == pytest.approx(line.get("raw_error_jvp_rows", line["raw_error"]), rel=1e-5)


@FRAMEWORKS
def test_decoupled_meanflow_starts_from_the_averaged_weights_of_the_flow_model(framework, runs):
    """Adam moves no weight by more than its rate in these first steps; the flow model's own moved much farther."""
    (flow, told), (dmf, told_too) = (runs[framework][name] for name in ("flow", "dmf"))
    assert "logvar_linear.bias, logvar_linear.weight start fresh" in told_too and "start fresh" not in told
    average, raw, found = read(framework, flow, 0), read(framework, flow, -1), read(framework, dmf, -1)
    assert found.keys() - average.keys() == {"logvar_linear.bias", "logvar_linear.weight"}
    assert 0 < distance(found, average, average) < 1.1 * STEPS["dmf"] * RATE
    assert distance(raw, average, average) > 10 * STEPS["dmf"] * RATE


@FRAMEWORKS
def test_samples_by_ctm_do_not_depend_on_the_batching(framework, launcher, runs, tmp_path):
    run = runs[framework]["distilled"][0]
    ctm = sample(launcher, framework, run, tmp_path / "a", "--sampler=ctm", "--steps=2")
    assert ctm.shape == (7, 8, 8, 1) and np.isfinite(ctm).all()
    again = sample(launcher, framework, run, tmp_path / "b", "--sampler=ctm", "--steps=2", "--batch_size=3")
    np.testing.assert_allclose(again, ctm, atol=1e-5)


@FRAMEWORKS
def test_samples_of_a_flow_model(framework, launcher, runs, tmp_path):
    run = runs[framework]["flow"][0]
    guided = ("--cfg_scale=2", "--interval=0,0.7")
    images = [
        sample(launcher, framework, run, tmp_path / sampler, f"--sampler={sampler}", "--steps=3", *guided)
        for sampler in ("heun", "sde")
    ]
    assert all(np.isfinite(a).all() for a in images) and np.abs(images[0] - images[1]).max() > 1e-3


@FRAMEWORKS
@pytest.mark.parametrize(
    ("teacher", "changes", "message"),
    [
        ("dmf", {}, "has config.method.name decoupled, not flow"),
        ("flow", {"model.num_classes": 12}, "has config.model.num_classes 10, this model 12"),
        ("none", {}, "there is no "),
    ],
)
def test_a_teacher_that_cannot_teach(
    framework, teacher, changes, message, refused, options, tiny_decoupled, runs, tmp_path
):
    changes = changes | {
        "method.guidance_type": "distill",
        "method.teacher": runs[framework]["flow"][0].with_name(teacher),
    }
    assert message in refused(TRAIN[framework], *options(tiny_decoupled | changes), f"--workdir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()  # the run may be tried again with another teacher


@FRAMEWORKS
def test_a_run_goes_on_with_its_teacher_elsewhere_and_with_no_other(
    framework, launcher, refused, options, tiny_decoupled, runs, tmp_path
):
    """The same weights in a file are the same teacher; what the run started from may be gone."""
    run = shutil.copytree(runs[framework]["distilled"][0], tmp_path / "run")
    file = tmp_path / "moved.safetensors"
    changes = {"method.guidance_type": "distill", "method.teacher": file, "train.steps": 3}
    argv = (TRAIN[framework], *options(tiny_decoupled | changes), f"--workdir={run}")
    of(framework, "weights").save(file, read(framework, runs[framework]["flow"][0], 1), {"source": "a run"})
    assert f"{file}', which holds other data" in refused(*argv)
    of(framework, "weights").save(file, read(framework, runs[framework]["flow"][0], 0), {"source": "a run"})
    command = launcher.run(*argv)
    assert command.wait() == 0 and "resuming from step 2" in command.stderr, command.stderr


@FRAMEWORKS
def test_a_sampler_of_other_models(framework, refused, runs, tmp_path):
    run = runs[framework]["flow"][0]
    message = refused(SAMPLE[framework], f"--workdir={run}", f"--output={tmp_path}", "--sampler=ctm")
    assert "config.sample.sampler is 'ctm'; choose one of euler, heun, sde" in message
