"""A sweep over metrics that the test makes up: one judgement a pair, the table, the best, and what is written."""

import functools
import json

import numpy as np
import processes
import pytest
import tiny

from configs import digits
from meanflow import files
from meanflow.commands import data_metrics, evaluate, evaluate_images, guidance_sweep, guidance_sweep_page
from meanflow.commands.frozen_networks import FrozenNetworks
from meanflow.config import options
from meanflow.errors import UserError
from meanflow.metrics import references
from meanflow.process_group import ProcessGroup
from meanflow.sampling.plots import image

ROWS = [
    {"omega": 1.0, "interval": (0.0, 1.0), "num_samples": 9, "class_accuracy": 0.5, "frechet_distance_pixels": 2.0},
    {"omega": 4.0, "interval": (0.0, 1.0), "num_samples": 9, "class_accuracy": 0.75, "frechet_distance_pixels": 3.0},
    {"omega": 1.0, "interval": (0.4, 0.65), "num_samples": 9, "class_accuracy": 0.75, "frechet_distance_pixels": 1.5},
]
REAL = {"real_class_accuracy": 0.9931, "real_frechet_distance_pixels": 1.0}


@pytest.fixture
def config():
    config = tiny.compose({"model.name": "imf_dit", "method.name": "improved"})
    return config


@pytest.fixture
def parse(parse_flags):
    """Return a function that parses the flags of an evaluation."""
    return functools.partial(parse_flags, evaluate.define_flags)


def pairs(configs):
    return [(c.sample.omega, c.sample.interval) for c in configs]


def test_every_pair_of_both_lists(config, parse):
    parse("--omegas=1,8", "--intervals=0:1,0.4:0.65")
    whole, part = (0.0, 1.0), (0.4, 0.65)
    before = config.to_dict()
    assert pairs(evaluate.guided(config)) == [(1, whole), (8, whole), (1, part), (8, part)]
    assert config.to_dict() == before


def test_one_list_alone_takes_the_other_from_the_config(config, parse):
    config.sample.update(omega=2.0, interval=(0.25, 0.5))
    parse("--omegas=1,8,1")
    assert pairs(evaluate.guided(config)) == [(1, (0.25, 0.5)), (8, (0.25, 0.5))]


def test_intervals_alone(config, parse):
    config.sample.update(omega=2.0, interval=(0.25, 0.5))
    parse("--intervals=0:0.5")
    assert pairs(evaluate.guided(config)) == [(2, (0, 0.5))]


def test_without_the_flags_there_is_no_sweep(config, parse):
    parse("--steps=2")
    assert evaluate.guided(config) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--omegas=1,a",), "--omegas: .*'a'"),
        (("--omegas=",), "--omegas needs at least one"),
        (("--omegas=0.5",), "sample.omega is 0.5; it must be at least 1"),
        (("--intervals=0.5",), "takes start:end each"),
        (("--intervals=0.5:b",), "--intervals: .*'b'"),
        (("--intervals=0.5:0.1",), "must rise"),
        (("--omegas=1", "--omega=2"), "--omegas .* excludes --omega"),
        (("--intervals=0:1", "--interval=0,1"), "--intervals .* excludes --interval"),
    ],
)
def test_flags_of_no_sense(config, parse, argv, message):
    parse(*argv)
    with pytest.raises(UserError, match=message):
        evaluate.guided(config)


@pytest.mark.parametrize("argv", ["--omegas=1,2", "--intervals=0:1"])
def test_a_network_that_is_told_no_guidance(parse, argv):
    parse(argv)
    with pytest.raises(UserError, match=f"{argv.split('=')[0]} is for .* meanflow: .* --cfg_scale"):
        evaluate.guided(digits.get_config())


def test_each_pair_is_evaluated_once(config, parse):
    """Pictures are those of the first interval, a few of each scale."""
    judged = []

    def judge(c):
        judged.append((c.sample.omega, c.sample.interval))
        metric = c.sample.omega + c.sample.interval[0]
        return {"metric": metric}, np.full((50, 2, 2, 1), metric)

    parse("--omegas=1,8", "--intervals=0.25:1,0.5:1")
    configs = evaluate.guided(config)
    rows, images = guidance_sweep.sweep(configs, judge)
    assert judged == pairs(configs) and len(judged) == 4
    assert [row["metric"] for row in rows] == [1.25, 8.25, 1.5, 8.5]
    assert [(row["omega"], row["interval"]) for row in rows] == judged
    assert {omega: a.shape for omega, a in images.items()} == {1: (36, 2, 2, 1), 8: (36, 2, 2, 1)}
    assert (images[8] == 8.25).all()
    assert images[8].base is None  # not a view, which would keep all the samples


def test_best():
    """The first of equal accuracies, which are to be high; the least distance."""
    assert guidance_sweep.best(ROWS) == {"class_accuracy": ROWS[1], "frechet_distance_pixels": ROWS[2]}
    assert guidance_sweep.best_lines(ROWS) == [
        "best class_accuracy: 0.75 with --omega=4 --interval=0,1",
        "best frechet_distance_pixels: 1.5 with --omega=1 --interval=0.4,0.65",
    ]


def test_table():
    names, rule, *lines = guidance_sweep.table([row | REAL for row in ROWS]).splitlines()
    assert [cell.strip() for cell in names.strip("|").split("|")] == [
        "omega", "interval", "class_accuracy", "frechet_distance_pixels",
    ]  # fmt: skip
    assert set(rule) == set("|-:") and len({len(line) for line in (names, rule, *lines)}) == 1
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == [
        ["1", "0:1", "0.5", "2"],
        ["4", "0:1", "0.75", "3"],
        ["1", "0.4:0.65", "0.75", "1.5"],
        ["real", "", "0.9931", "1"],
    ]
    assert len(guidance_sweep.table(ROWS).splitlines()) == 5


def test_json_and_page(config, tmp_path):
    images = {omega: np.zeros((5, 8, 8, 1), np.float32) for omega in (1.0, 4.0)}
    config.name = "digits & more"
    path = evaluate.write(tmp_path / "run", config, [row | REAL for row in ROWS], images)
    assert path == tmp_path / "run" / "sweep.html" and len(list(path.parent.iterdir())) == 2
    rows = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert rows == [row | REAL | {"interval": list(row["interval"])} for row in ROWS]
    page = path.read_text()
    assert page.count("src='data:image/png;base64,") == page.count("<img") == 2
    assert page.count("<tr>") == 5 and "0.4:0.65" in page and "0.9931" in page
    assert "digits &amp; more" in page and "http" not in page
    assert "best class_accuracy: 0.75 with --omega=4 --interval=0,1" in page
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file/sweep.json"):
        evaluate.write(tmp_path / "file", config, ROWS, images)


def test_curves():
    """One panel a metric, a line an interval with its points in order, and a dashed one of the real images."""
    panels = guidance_sweep_page.curves([row | REAL for row in ROWS[::-1]]).axes
    assert [axes.get_ylabel() for axes in panels] == ["class_accuracy", "frechet_distance_pixels"]
    part, whole, real = panels[1].lines
    assert (part.get_label(), part.get_xydata().tolist()) == ("interval 0.4:0.65", [[1, 1.5]])
    assert (whole.get_label(), whole.get_xydata().tolist()) == ("interval 0:1", [[1, 2], [4, 3]])
    assert (real.get_label(), real.get_linestyle(), set(real.get_ydata())) == ("real test images", "--", {1.0})
    assert len(guidance_sweep_page.curves(ROWS).axes[0].lines) == 2


@pytest.mark.parametrize("num", [1, 3, 5])
def test_pictures(num):
    images = {float(omega): np.full((4, 32, 32, 3), -1 + 2 * omega / 255) for omega in range(1, num + 1)}
    shown = [axes for axes in guidance_sweep_page.pictures(images).axes if axes.images]
    assert [axes.get_title() for axes in shown] == [f"omega {omega}" for omega in range(1, num + 1)]
    assert all(axes.images[0].get_array()[5, 5, 0] == i for i, axes in enumerate(shown, 1))
    assert {axes.images[0].get_clim() for axes in shown} == {(0, 255)}


def test_an_image_stands_alone():
    shown = image(guidance_sweep_page.curves(ROWS), "it's <all>")
    assert shown.startswith("<img alt='it&#x27;s &lt;all&gt;' src='data:image/png;base64,iVBOR") and shown.endswith(
        "'>"
    )


@pytest.fixture
def run(config, monkeypatch, tmp_path):
    """Return a loader of a run whose images are 1 / omega everywhere, judged by that number."""

    def judge(images, labels, config, features, real):
        return {"num_samples": len(images), "frechet_distance_pixels": float(images.mean())} | real.bound

    real = data_metrics.Real(np.zeros((9, 8, 8, 1)), np.arange(9), {"real_frechet_distance_pixels": 0.25})
    monkeypatch.setattr(data_metrics, "load_real", lambda config: real)
    monkeypatch.setattr(data_metrics, "evaluate_samples", judge)
    monkeypatch.setattr(evaluate, "workdir", lambda: str(tmp_path))
    monkeypatch.setattr(evaluate, "read_workdir", lambda path: config)
    return lambda *_: (config, lambda weights, noise, y, c, fresh: 0 * noise + weights / c.omega, 1.0)


def test_evaluate_without_a_sweep_prints_one_line(run, parse, tmp_path, capsys):
    parse("--num_samples=6")
    evaluate.evaluate(run, None, lambda config: ProcessGroup())
    result = {"num_samples": 6, "frechet_distance_pixels": 1.0, "real_frechet_distance_pixels": 0.25}
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "evaluation.json").read_text()) == result
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "evaluation.png"]


def test_evaluate_prints_the_table_and_the_best(run, parse, tmp_path, capsys):
    parse("--num_samples=6", "--omegas=1,4,2")
    evaluate.evaluate(run, None, lambda config: ProcessGroup())
    *lines, best, path = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip(" -:") for line in lines] == ["omega", "", "1", "4", "2", "real"]
    assert best == "best frechet_distance_pixels: 0.25 with --omega=4 --interval=0,1"
    assert path == str(tmp_path / "sweep.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.html", "sweep.json"]


@pytest.fixture
def read_only(monkeypatch, tmp_path):
    """Make the work directory one that cannot be written."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluate, "workdir", lambda: str(tmp_path / "file"))


@pytest.mark.parametrize("argv", [(), ("--omegas=1,4,2",)])
def test_results_are_printed_where_nothing_can_be_written(run, read_only, parse, tmp_path, capsys, caplog, argv):
    """Which a warning tells before the sampling."""
    parse("--num_samples=6", *argv)
    evaluate.evaluate(run, None, lambda config: ProcessGroup())
    assert "frechet_distance_pixels" in capsys.readouterr().out
    assert "Results are printed but not written" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("argv", [(), ("--omegas=1,4,2",)])
def test_results_are_printed_before_the_disk_is_full(run, parse, capsys, monkeypatch, argv):
    def full(path, text):
        raise files.cannot_write(path, OSError(28, "No space left on device"))

    parse("--num_samples=6", *argv)
    monkeypatch.setattr(files, "replace_text", full)
    with pytest.raises(UserError, match="cannot write .*: No space left"):
        evaluate.evaluate(run, None, lambda config: ProcessGroup())
    assert "frechet_distance_pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "name"), [("png", "000005.png"), ("png", "dataset.json"), ("npz", "samples_uint8.npz")]
)
def test_metrics_survive_images_that_cannot_be_saved(
    noisy, parse, reference, capsys, monkeypatch, tmp_path, kind, name
):
    replace = files.replace_bytes

    def full(path, content):
        if path.name == name:
            raise files.cannot_write(path, OSError(28, "No space left on device"))
        replace(path, content)

    monkeypatch.setattr(files, "replace_bytes", full)
    parse("--num_samples=9", "--metrics=fid", "--inception=w", f"--reference={reference}", f"--save={kind}")
    with pytest.raises(UserError, match=f"cannot write .*{name}: No space left"):
        evaluate.evaluate(noisy, FRAMEWORK, lambda config: ProcessGroup())
    result = json.loads(capsys.readouterr().out)
    assert result["fid"] > 0 and json.loads((tmp_path / "evaluation.json").read_text()) == result


def test_a_sweep_that_fails_leaves_its_rows_in_the_log(run, parse, monkeypatch, caplog):
    caplog.set_level("INFO")
    parse("--num_samples=6", "--omegas=1,4")
    config, sampler, weights = run()

    def failing(weights, noise, y, c, fresh):
        return sampler(weights, noise, y, c, fresh) if c.omega < 2 else pytest.fail("a later pair fails")

    with pytest.raises(pytest.fail.Exception):
        evaluate.evaluate(lambda *_: (config, failing, weights), None, lambda config: ProcessGroup())
    row = {"omega": 1.0, "interval": [0.0, 1.0], "num_samples": 6, "frechet_distance_pixels": 1.0}
    assert json.dumps(row | {"real_frechet_distance_pixels": 0.25}) in caplog.text


@pytest.mark.parametrize(
    ("real", "message"),
    [
        (np.zeros((1, 8, 8, 1)), "a distance needs at least two real images"),
        (np.zeros((2, 8, 8, 1)), "all real images have the same class: set --config.evaluation.classifier=False"),
    ],
)
def test_what_cannot_be_compared_is_not_sampled(noisy, sampled, parse, monkeypatch, real, message):
    labels = np.minimum(np.arange(len(real)), len(real) - 2)
    monkeypatch.setattr(data_metrics, "load_real", lambda config: data_metrics.Real(real, labels, {}))
    parse("--num_samples=9")
    with pytest.raises(UserError, match=message):
        evaluate.evaluate(noisy, FRAMEWORK, lambda config: ProcessGroup())
    assert not sampled


def test_flags_of_metrics_replace_the_options_of_a_copy(config, parse):
    before = config.to_dict()
    parse()
    assert evaluate.overridden(config).to_dict() == before
    parse("--metrics=fid,is", "--reference=r.npz", "--inception=w", "--convention=pytorch_fid", "--dino=d",
          "--num_samples=17")  # fmt: skip
    c = evaluate.overridden(config).evaluation
    assert (c.metrics, c.reference, c.inception, c.convention) == (("fid", "is"), "r.npz", "w", "pytorch_fid")
    assert (c.dino, c.num_samples) == ("d", 17) and config.to_dict() == before
    config.evaluation.update(metrics=("is",), inception="w")
    parse("--metrics=")
    assert evaluate.overridden(config).evaluation.metrics == ()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--metrics=fvd",), "evaluation.metrics has 'fvd'; choose from fid, is, kid, pr, fd_dinov2"),
        (("--metrics=is",), "evaluation.inception names no weights"),
        (("--metrics=fd_dinov2",), "evaluation.reference names no statistics"),
        (("--num_samples=1",), "evaluation.num_samples is 1; it must be at least 2"),
    ],
)
def test_metrics_of_no_sense(config, parse, argv, message):
    parse(*argv)
    with pytest.raises(UserError, match=message):
        evaluate.overridden(config)


def test_a_reference_that_is_to_be_made_need_not_be_there(config, parse):
    parse("--metrics=fid,fd_dinov2", "--make_reference=images")
    assert evaluate.overridden(config).evaluation.metrics == ("fid", "fd_dinov2")


@pytest.mark.parametrize(
    ("flag", "function"), [("make_reference", "make_reference"), ("samples", "evaluate_samples")]
)  # of `stored`
def test_stored_images_need_no_model(parse, monkeypatch, flag, function):
    calls = []
    monkeypatch.setattr(evaluate_images, function, lambda *args: calls.append(args))
    parse(f"--{flag}=images", "--metrics=is", "--inception=w")
    start, framework = object(), object()
    evaluate.evaluate(lambda *_: pytest.fail("it loads a model"), framework, start)
    ((first, second, config),) = calls
    assert first is framework and second is start and config.evaluation.metrics == ("is",)
    config.evaluation.update(metrics=(), inception="")
    assert config.to_dict() == options.get_config().to_dict()


FRAMEWORK = FrozenNetworks(None, lambda *_: lambda images: {"pool": images.reshape(len(images), -1)[:, :2] / 255.0})


@pytest.fixture
def reference(tmp_path_factory):
    """Return the path of statistics for the features of `FRAMEWORK`."""
    path = tmp_path_factory.mktemp("reference") / "real.npz"
    references.write(path, references.Reference(np.zeros(2), np.eye(2), 9))
    return str(path)


@pytest.fixture
def sampled():
    """Return the list of how many samples each call of the sampler of `noisy` made."""
    return []


@pytest.fixture
def noisy(run, config, sampled):
    """Return a loader of a run whose images are noise over omega."""

    def sampler(weights, noise, y, c, fresh):
        sampled.append(len(noise))
        return np.tanh(noise) / c.omega

    config.sample.batch_size = 4
    return lambda *_: (config, sampler, 1.0)


@pytest.mark.parametrize("num", [1, 2])
def test_metrics_are_printed_with_what_they_depend_on(noisy, sampled, parse, reference, tmp_path, capsys, num):
    """By the first process; all share the samples."""
    parse("--num_samples=9", "--metrics=fid", "--inception=w", f"--reference={reference}", "--save=png")
    processes.run(num, lambda group: evaluate.evaluate(noisy, FRAMEWORK, lambda config: group))
    assert sampled == [4] * 3
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result.keys() == {"num_samples", "fid", "convention", "reference"} and result["num_samples"] == 9
    assert (result["convention"], result["reference"]) == ("torch_fidelity", reference)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == result
    assert {path.name for path in tmp_path.iterdir()} == {"evaluation.json", "evaluation.png", "evaluation"}
    assert len(list((tmp_path / "evaluation").glob("*.png"))) == 9


def test_processes_share_the_samples_of_the_data_themselves(noisy, sampled, parse, tmp_path, capsys):
    parse("--num_samples=9")
    processes.run(2, lambda group: evaluate.evaluate(noisy, FRAMEWORK, lambda config: group))
    assert sampled == [4] * 3
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == json.loads((tmp_path / "evaluation.json").read_text())


def test_a_sweep_of_metrics(noisy, parse, reference, tmp_path, capsys):
    parse("--num_samples=9", "--metrics=fid", "--inception=w", f"--reference={reference}", "--omegas=1,4")
    processes.run(2, lambda group: evaluate.evaluate(noisy, FRAMEWORK, lambda config: group))
    names, _, *lines, best, path = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in names.strip("|").split("|")] == ["omega", "interval", "fid"] and len(lines) == 2
    assert best.startswith("best fid: ") and path == str(tmp_path / "sweep.html")
    first, second = json.loads((tmp_path / "sweep.json").read_text())
    assert (first["omega"], second["omega"]) == (1, 4) and first["fid"] != second["fid"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--save=png",), "--save needs --metrics here; the sample command saves"),
        (
            ("--save=png", "--omegas=1,2", "--metrics=is", "--inception=w"),
            "--save keeps the images of a single guidance",
        ),
        (("--metrics=is", "--inception=w", "--vae=some/vae"), "--vae decodes latents, but this model makes images"),
    ],
)
def test_what_cannot_be_saved_or_decoded(run, parse, argv, message, tmp_path):
    parse(*argv)
    with pytest.raises(UserError, match=message):
        evaluate.evaluate(run, FRAMEWORK, lambda config: ProcessGroup())
    assert not list(tmp_path.iterdir())


def test_the_processes_join_before_anything_is_computed(run, config, parse):
    order = []

    def load(*args):
        order.append("load")
        return run(*args)

    parse("--num_samples=2")
    evaluate.evaluate(load, None, lambda c: order.append(c) or ProcessGroup())
    assert order == [config, "load"]
