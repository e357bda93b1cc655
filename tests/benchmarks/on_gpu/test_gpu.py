"""The command for the day there is a GPU: what it schedules, what it writes, and its pieces on the CPU."""

import importlib.util
import io
import json
import math
import pathlib
import sys
import time

import pytest

from benchmarks import gpu, presets
from benchmarks.on_gpu import attention, report, resume, runner, timed
from benchmarks.on_gpu.pieces import Piece, every_piece
from benchmarks.on_gpu.runner import Row
from meanflow.config import store
from meanflow.errors import UserError
from torch_impl.models import attention as torch_attention

CARD = runner.Card(gib=80, num_gpus=1)
FIGURES = {
    "config": "meanflow_imagenet:b4", "rows": 32, "dtype": "bfloat16", "median_s": 0.01, "model_flops": 1e12,
    "model_flops_per_s": 1e14, "matmul_flops_per_s": 5e14, "share_of_matmul_rate": 0.2, "peak_bytes": 3 * 2**30,
    "peak_kind": "planned by XLA", "preparing_s": 80.0,
}  # fmt: skip


def piece(name, script, limit=20, **more):
    return Piece(name, (sys.executable, "-c", script), limit, **more)


@pytest.fixture
def run(tmp_path):
    """Return a function (pieces, ...) -> {name: row}."""

    def run(*pieces, budget=60.0, card=CARD):
        rows = runner.Schedule(pieces, card, jobs=2, budget=budget, logs=tmp_path / "logs").run()
        assert [row.name for row in rows] == [piece.name for piece in pieces]
        return {row.name: row for row in rows}

    return run


def test_nothing_stops_the_others(run, tmp_path):
    forks = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    rows = run(
        piece("fails", "print('so far'); raise SystemExit('no such kernel')"),
        piece("hangs", forks, limit=1),
        piece("crashes", "import os; os.abort()"),
        piece("passes", "print('a line'); print('{\"error\": 0.5}')"),
        piece("speaks", "print('agree')"),
        piece("two", "", num_gpus=2),
        piece("large", "", gib=81),
    )  # fmt: skip
    assert {name: row.status for name, row in rows.items()} == {
        "fails": "failed", "hangs": "out of time", "crashes": "failed", "passes": "passed", "speaks": "passed",
        "two": "skipped", "large": "skipped",
    }  # fmt: skip
    assert rows["fails"].said == "so far\nno such kernel"
    assert rows["passes"].figures == {"error": 0.5} and rows["speaks"].figures == {"result": "agree"}
    assert rows["hangs"].seconds < 10 and rows["two"].said == "needs 2 GPUs"


def test_what_is_timed_has_the_card_to_itself(run, tmp_path):
    """Each notes when it was at work; what is timed notes only its measurement."""
    note = (
        "import time, pathlib; a = time.time(); {wait} time.sleep({seconds}); "
        "pathlib.Path({path!r}).write_text(f'{{a}} {{time.time()}}')"
    )
    script = {
        name: note.format(wait="print('ready', flush=True); input(); a = time.time();" if is_timed else "",
                          seconds=0.5, path=str(tmp_path / name))
        for name, is_timed in (("one", True), ("two", True), ("three", True), ("other", False), ("another", False))
    }  # fmt: skip
    pieces = [piece(name, script[name], timed=name in ("one", "two", "three"), gib=30) for name in script]
    rows = run(*pieces)
    assert {row.status for row in rows.values()} == {"passed"}
    spans = {name: tuple(map(float, (tmp_path / name).read_text().split())) for name in script}
    for name in ("one", "two", "three"):
        begin, end = spans[name]
        assert all(end <= other[0] or begin >= other[1] for key, other in spans.items() if key != name), spans


def test_at_the_end_of_the_budget_everything_stops(run):
    began = time.monotonic()
    rows = run(*(piece(f"{i}", "import time; time.sleep(60)") for i in range(4)), budget=2)
    assert time.monotonic() - began < 10
    assert {row.status for row in rows.values()} == {"out of time"}
    assert rows["3"].said == "not started: the budget was used up"


def test_the_last_seconds_are_kept_for_what_is_ready(run, monkeypatch):
    monkeypatch.setattr(runner, "MEASURING", 5)
    ready = "print('ready', flush=True); input(); print('{}')"
    rows = run(piece("step", ready, timed=True), piece("slow", "import time; time.sleep(60)"), budget=9)
    assert (rows["step"].status, rows["slow"].status) == ("passed", "out of time")


@pytest.mark.parametrize("cpu", [False, True])
def test_every_piece_can_be_started(cpu):
    pieces = every_piece(pathlib.Path("/somewhere"), cpu)
    assert len({piece.name for piece in pieces}) == len(pieces) > 25
    for piece in pieces:
        program = piece.argv[1]
        assert importlib.util.find_spec(piece.argv[2]) if program == "-m" else pathlib.Path(program).exists()
    if not cpu:
        assert all("--gpu" in piece.argv for piece in pieces if piece.name.startswith(("cpu_and", "parity")))


def test_pieces_are_listed_chosen_and_refused(monkeypatch, capsys):
    assert gpu.main(["--list", "--only=^step/"]) == 0
    assert capsys.readouterr().out.split() == [f"step/{r}/{f}" for r in ("b4", "xl2") for f in ("jax", "torch")]
    with pytest.raises(UserError, match="no piece matches"):
        gpu.main(["--list", "--only=nothing"])
    monkeypatch.setattr(gpu, "QUERY", ("false",))
    with pytest.raises(UserError, match="finds no GPU"):
        gpu.main([])


def test_the_page_names_the_card_and_shows_steps_beside_the_rehearsal(monkeypatch, tmp_path):
    """The prediction is for the same config and rows alone."""
    monkeypatch.setattr(gpu, "QUERY", ("echo", "NVIDIA H100 80GB HBM3, 81559, 570.1"))
    machine = gpu.describe_machine(gpu.gpus())
    predicted = {
        "framework": "jax", "config": "meanflow_imagenet:b4", "cards": 1, "batch": 32, "peak_bytes": 2 * 2**30,
        "forward_flops": 1e11, "collectives": {},
        "parts": dict.fromkeys(("parameters", "optimizer", "ema", "gradients", "batch", "temporaries"), 1e9),
    }  # fmt: skip
    monkeypatch.setattr(report, "PREDICTED", tmp_path / "rehearsal.json")
    report.PREDICTED.write_text(json.dumps([predicted]))
    rows = [
        Row("step/b4/jax", "passed", 9.0, FIGURES, ""), Row("step/b4/torch", "passed", 9.0, FIGURES, ""),
        Row("digits/dit/torch", "failed", 3.0, {}, "Traceback\nRuntimeError: a | b"),
    ]  # fmt: skip
    page = report.write(rows, machine, tmp_path)
    assert page.name == "nvidia_h100_80gb_hbm3.md"
    text = page.read_text()
    assert "2 passed, 1 failed" in text and "* driver: 570.1" in text and "RuntimeError: a \\| b |" in text
    jax, torch = (line for line in text.splitlines() if line.startswith("| b4/"))
    assert "| 10.0 | 3200 | 100.00 | 20.0% | 3.00 | 2.00 | " in jax and torch.endswith("| 3.00 | – | – | 80 |")
    found = json.loads(page.with_suffix(".json").read_text())
    assert found["rows"][2]["said"].startswith("Traceback") and found["machine"]["card"] == machine["card"]


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_step_is_timed_once_it_may(framework, monkeypatch, capsys, tmp_path):
    config = "tests/helpers/tiny.py:dit,meanflow"
    monkeypatch.setattr(timed.sys, "stdin", io.StringIO("\n"))
    monkeypatch.setattr(timed, "RUNS", 2)
    load = store.load_file

    def uncompiled(path):
        found = load(path)
        found.train.compile = False
        return found

    monkeypatch.setattr(timed.store, "load_file", uncompiled)
    found = timed.main(framework, config, "8")
    assert capsys.readouterr().out == "ready\n"
    assert found["rows"] == 8 and 0 < found["fastest_s"] <= found["median_s"] <= found["slowest_s"]
    assert 0 < found["share_of_matmul_rate"] < 1


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_attention_is_compared_and_a_wrong_kernel_is_seen(framework, monkeypatch):
    monkeypatch.setattr(attention, "SHAPES", [(2, 2, 18, 16)])
    errors = attention.main(framework)["2x2x18x16"]
    assert {"plain gradients", "fused gradients"} <= errors.keys() and max(errors.values()) < 0.02
    kernels = torch_attention.KERNELS if framework == "torch" else None
    if kernels:
        monkeypatch.setitem(kernels, "fused", lambda q, k, v: torch_attention.plain(1.2 * q, k, v))
    else:
        from jax_impl.models import attention as jax_attention

        monkeypatch.setattr(jax_attention, "fused", lambda q, k, v: jax_attention.plain(1.2 * q, k, v))
    with pytest.raises(SystemExit, match="fused gradients at 2x2x18x16 has error"):
        attention.main(framework)


@pytest.mark.slow
def test_a_run_is_killed_and_resumed(tmp_path):
    found = resume.main("jax", str(tmp_path), "60")
    assert found["raw_error_apart"] < 1e-6 and "class_accuracy" in found["score"]


def published(peak_gib, **more):
    """Return a report whose state takes 10 GiB, of 256 rows on 8 cards."""
    gib = 2**30
    parts = {"parameters": 10 * gib, "optimizer": 0, "ema": 0, "gradients": 0, "batch": 0,
             "temporaries": int((peak_gib - 10) * gib)}  # fmt: skip
    return {"framework": "jax", "config": "meanflow_imagenet:xl2", "card": "h100", "cards": 8, "batch": 256,
            "parts": parts, "peak_bytes": int(peak_gib * gib), "peak_kind": "planned by XLA", "collectives": {},
            "custom_calls": {}, "flops": 1e12, "forward_flops": 1e11, "seconds": 1.0} | more  # fmt: skip


def test_presets_say_what_fits(monkeypatch, tmp_path):
    """A state of 10 GiB, and 10 GiB for 32 rows: 200 rows fit an H100, 4 micro-batches of 32 two cards of 24 GB."""
    from benchmarks.rehearsal import cards

    found = published(20.0)
    h100, rtx = cards.find("h100"), cards.find("rtx4090")
    assert presets.most_rows(found, h100) == math.floor((cards.usable(h100) / 2**30 - 10) * 32 / 10)
    assert presets.fewest_cards(found, h100) == (1, 2) and presets.fewest_cards(found, rtx) == (1, 8)
    with_gradients = published(20.0, parts=found["parts"] | {"parameters": 7 * 2**30, "gradients": 3 * 2**30})
    assert presets.fewest_cards(with_gradients, h100) == (1, 2)  # of 56.8 GiB, in place of 62.8
    assert presets.fewest_cards(with_gradients, rtx) == (2, 8)  # 21 GiB, where one card needs 26
    monkeypatch.setattr(presets, "rehearse", lambda *_: found)
    output = tmp_path / "rehearsal.md"
    presets.main(
        ["--only=imagenet:xl2 .x$|xl2 1x", "--frameworks", "jax", f"--workdir={tmp_path}", f"--output={output}"]
    )
    text = output.read_text()
    assert "| `meanflow_imagenet:xl2_plus` | 256 |" in text and "| `imf_imagenet:xl2` | 1024 |" in text
    reports = json.loads(output.with_suffix(".json").read_text())
    assert [(r["cards"], r["batch"]) for r in reports] == [(8, 256), (8, 1024), (1, 32)]
    assert len(list(presets.settings())) == len({str(s) for s in presets.settings()}) == 12


def test_every_published_run_is_in_the_table():
    """But for networks that others have trained, and the variants that need what another needs."""
    from configs import dmf_imagenet, imf_imagenet, meanflow_imagenet

    listed = {
        file: {n for name, same in table.items() for n in (name, *same)} for file, table in presets.SAME_STEP.items()
    }
    for module in (dmf_imagenet, imf_imagenet, meanflow_imagenet):
        assert listed[module.__name__.removeprefix("configs.")] == set(module.VARIANTS)
    for file, variants in presets.SAME_STEP.items():
        for rehearsed, same in variants.items():
            first, *others = (presets.load(f"{file}:{variant}") for variant in (rehearsed, *same))
            assert all(c.model.to_dict() == first.model.to_dict() for c in others)
            assert all(c.train.batch_size == first.train.batch_size for c in others)
