"""The command, with a stand-in for the rehearsal itself."""

import json
import runpy
import sys

import pytest

from benchmarks.rehearsal import attempts, cards
from meanflow.config import store

GIB = 2**30
SMALL = "--config=tests/helpers/tiny.py:dit,meanflow"


def report(peak):
    """Return what a rehearsal says that needs `peak` bytes, 2 GiB of them for the state."""
    parts = {"parameters": GIB, "optimizer": GIB, "ema": 0, "gradients": 0, "batch": 0, "temporaries": peak - 2 * GIB}
    return {
        "parts": parts, "peak_bytes": peak, "peak_kind": "planned by XLA", "collectives": {}, "custom_calls": {},
        "largest": [{"bytes": GIB, "count": 2, "shape": "bf16[8,4]", "where": "jax_impl/models/dit.py:1 (f)"}],
        "flops": 1e12, "forward_flops": 1e9, "assumed": ["nothing"], "seconds": 1.0,
    }  # fmt: skip


@pytest.fixture
def run(own_flags, monkeypatch, capsys):
    """Return a function (peak of a config, *argv) that runs the command, and returns its exit code and its output."""
    from absl import app

    monkeypatch.setattr(app, "run", lambda main, flags_parser: main(flags_parser(sys.argv)))

    def run(peak, *argv):
        monkeypatch.setattr(sys, "argv", ["rehearse.py", *argv])
        program = runpy.run_path("benchmarks/rehearse.py", run_name="rehearse")
        program["main"].__globals__["rehearse"] = lambda _, config, *more: report(peak(config))
        try:
            program["run"](program["main"])
        except SystemExit as ended:
            return ended.code, capsys.readouterr()
        return 0, capsys.readouterr()

    return run


def test_a_step_that_fits_is_shown_and_written(run, tmp_path):
    paths = [tmp_path / "deep" / name for name in ("a.md", "a.json", "a.png")]
    flags = [f"--{flag}={path}" for flag, path in zip(("markdown", "json", "plot"), paths, strict=True)]
    code, written = run(lambda _: 10 * GIB, "--framework=torch", SMALL, "--devices=2", *flags)
    assert code == 0 and written.out == paths[0].read_text()
    assert "10.0 GiB a card" in written.out and "| 1024 | 2 | bf16[8,4] | jax_impl/models/dit.py:1 (f) |" in written.out
    found = json.loads(paths[1].read_text())
    assert (found["fits"], found["cards"], found["card"]) == (True, 2, "NVIDIA H100 80GB HBM3")
    assert found["bounds"]["gpu_hours"] > 0 and "remedy" not in found
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_a_step_that_does_not_fit_ends_with_code_1_and_what_does_fit(run):
    def peak(config):
        return (100 if config.train.accumulate == 1 else 40) * GIB

    code, written = run(peak, "--framework=jax", SMALL, "--devices=1")
    assert code == 1 and "does NOT fit" in written.out
    assert "It fits with --config.train.accumulate=2: 40.0 GiB." in written.out
    code, written = run(lambda _: 100 * GIB, "--framework=jax", SMALL, "--devices=1")
    assert code == 1 and "Nothing that was tried makes it fit" in written.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--framework=jax", SMALL, "--card=v100"], "there are numbers for h100"),
        (["--framework=jax", SMALL, "--devices=3"], "3"),
        (["--framework=jax", SMALL, "--devices=4", "--config.train.fsdp=3"], "fsdp"),
        (
            ["--framework=jax", "--config=configs/digits.py:dmf", "--config.method.guidance_type=distill"],
            "a teacher is not measured",
        ),
        (["--framework=jax"], "name a trainer and a recipe"),
        ([SMALL], "name a trainer and a recipe"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(refused, argv, message):
    assert message in refused("benchmarks/rehearse.py", *argv)


def test_the_largest_batch_is_found_in_a_few_rehearsals():
    config, tried = store.load_file("configs/meanflow_imagenet.py:b4"), []

    def attempt(batch):
        tried.append(batch)
        found = report(2 * GIB + batch * GIB // 8 + GIB // 2)  # not quite proportional
        return found

    card = cards.find("h100")
    best = attempts.largest_batch(attempt(256), config, card, 8, attempt)
    limit = (cards.usable(card) / GIB - 2.5) * 8
    assert limit - 64 <= best <= limit and len(tried) <= 5
