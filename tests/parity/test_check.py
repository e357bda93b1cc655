"""The command that proves parity: its flags, its JSON, its exit codes, and that nothing is skipped silently."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from meanflow.config import options
from meanflow.errors import UserError
from parity import check, oracle
from parity.cases import objectives

OPTIM = check.GOLDEN / "ema_lr_optim.npz"
QUICK = "golden/ema_lr_optim/(lr|ema)"


@pytest.fixture
def golden(tmp_path):
    """Return a function (**changed arrays; None removes one) -> a directory with a changed copy of a fixture."""

    def make(changes=(), name="ema_lr_optim"):
        with np.load(OPTIM) as file:
            arrays = {key: file[key] for key in file.files} | dict(changes)
        np.savez(tmp_path / f"{name}.npz", **{key: a for key, a in arrays.items() if a is not None})
        return tmp_path

    return make


def failed(result):
    return {f"{c.case} {c.quantity}" for c in result.checks if not c.ok}


def test_passes_and_writes_json(tmp_path, capsys):
    path = tmp_path / "checks.json"
    assert check.main(["--only", QUICK, "--json", str(path)]) == 0
    checks = json.loads(path.read_text())
    assert all(c.keys() == {"case", "framework", "quantity", "error", "bound", "ok"} for c in checks)
    assert {c["framework"] for c in checks} == {"jax", "torch"}
    assert all(c["ok"] is True and 0 <= c["error"] <= c["bound"] for c in checks)
    out, err = capsys.readouterr()
    assert f"{len(checks)} checks, 0 failed, 0 not covered; worst error/bound" in out
    assert "[1/6] golden/ema_lr_optim/ema" in err


def test_programs_of_many_cases_do_not_pile_up(monkeypatch):
    """Each is mapped into memory, and a process that has 65530 maps dies."""
    import jax

    before = []

    def remembering(measure):
        before.append(program._cache_size())  # pyright: ignore[reportAttributeAccessIssue]
        program(1.0)
        measure.add("jax", "nothing", 0.0, 1.0)

    program = jax.jit(lambda x: x + 1)
    monkeypatch.setattr(check, "FORGET_EVERY", 2)
    monkeypatch.setattr(objectives, "all_cases", lambda: [check.Case(f"many/{n}", remembering) for n in range(5)])
    check.run(only="many/")
    assert before == [0, 1, 0, 1, 0]


def test_only_matches_nothing():
    with pytest.raises(UserError, match="no case matches --only 'zzz'"):
        check.main(["--only", "zzz"])
    with pytest.raises(UserError, match="not a regular expression"):
        check.main(["--only", "("])


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        check.main(["--help"])
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--golden", "--only", "--jobs", "--json", "--report"))


def test_exit_code_of_the_script(launcher):
    assert launcher.run("parity/check.py", "--only", "zzz").poll() == 2


def test_jobs_is_positive(capsys):
    for text in ("0", "-1", "two"):
        with pytest.raises(SystemExit, match="^2$"):
            check.main(["--jobs", text])
    assert "invalid positive value" in capsys.readouterr().err


@pytest.mark.slow
def test_several_processes_find_the_same_in_the_same_order(monkeypatch):
    only, given = "(ema_lr_optim/lr|sit_torch/time|metrics/is)", []
    alone = check.run(only=only)
    original = check.workers.run
    monkeypatch.setattr(check.workers, "run", lambda *args: given.append(args) or original(*args))
    assert check.run(only=only, jobs=2) == alone and given[0][1] == 2


def test_empty_golden_directory(tmp_path):
    with pytest.raises(UserError, match="holds no golden fixture"):
        check.run(tmp_path)


def test_damaged_fixture(tmp_path):
    (tmp_path / "a.npz").write_bytes(OPTIM.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot read .*a\.npz"):
        check.run(tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_is_a_failure(golden, bad, tmp_path):
    directory = golden({"out/lr/pymf": np.full(22, bad)})
    path = tmp_path / "checks.json"
    assert check.main(["--golden", str(directory), "--only", "lr/pymf", "--json", str(path)]) == 1
    assert [c["error"] for c in json.loads(path.read_text())] == [None, None]


def test_other_shape_is_a_failure(golden):
    result = check.run(golden({"out/ema/jax_0.9": np.zeros((40, 5), np.float32)}), "ema_lr_optim/ema")
    assert not result.ok
    assert failed(result) == {"golden/ema_lr_optim/ema jax_0.9 (shape (40, 6), expected (40, 5))"}


def test_missing_key_is_a_failed_check_that_names_the_case(golden):
    result = check.run(golden({"in/ema/w": None}), QUICK)
    assert failed(result) == {"golden/ema_lr_optim/ema cannot be checked: ema_lr_optim has no 'in/ema/w'"}


def test_unknown_result_is_not_covered(golden, capsys):
    directory = golden({"out/lr/cubic": np.ones(3), "out/ema_of_what/x": np.ones(3), "out/opt/x/y": np.ones(3)})
    assert check.main(["--golden", str(directory), "--only", "(lr|ema_of_what)/"]) == 1
    out = capsys.readouterr().out
    assert "not covered: golden/ema_lr_optim/out/ema_of_what/x" in out
    assert "FAILED: golden/ema_lr_optim/lr/cubic" in out


def test_unread_result_of_a_known_case_is_not_covered(golden):
    with np.load(check.GOLDEN / "sit_torch.npz") as file:
        keys = [key for key in file.files if not key.startswith(("out/", "grad/", "in/loss"))]
        arrays = {key: file[key] for key in [*keys, "out/time/uniform/t", "out/time/uniform/r"]}
    directory = golden()
    np.savez(directory / "sit_torch.npz", **arrays, **{"out/time/uniform/more": np.ones(3)})
    result = check.run(directory, "sit_torch/time")
    assert result.not_covered == ["golden/sit_torch/out/time/uniform/more"]
    assert all(c.ok for c in result.checks) and not result.ok


def test_unknown_system(golden, monkeypatch):
    directory = golden({"config": np.array(json.dumps({"system": "another"}))}, name="another")
    shutil.copy(OPTIM, directory)
    result = check.run(directory, "another|lr/pymf")
    assert result.not_covered == ["golden/another"] and not result.ok
    assert check.run(directory, "ema_lr_optim/lr/pymf").ok
    # Without either flag it is listed only.
    monkeypatch.setattr(check, "GOLDEN", directory)
    for module in (objectives, check.extremes, check.precision, check.frozen_networks):
        monkeypatch.setattr(module, "all_cases", list)
    result = check.run()
    assert result.not_covered == ["golden/another"] and result.ok


def test_every_option_of_the_method_is_varied():
    settings = objectives.SETTINGS | objectives.NETWORK_SETTINGS
    for name, allowed in options.all_options().items():
        section, _, option = name.partition(".")
        if section != "method":
            continue
        values = {str(setting.get(option, getattr(allowed, "default", allowed))) for setting in settings.values()}
        assert len(values) > 1 or option in ("name", "stage1_steps", "stage_order"), option  # stages are the trainers'


@pytest.mark.parametrize("name", [name for name, s in objectives.SETTINGS.items() if s.get("guidance", True)])
def test_guidance_intervals_exclude_some_rows(name):
    config = objectives.config(method=objectives.SETTINGS[name])
    (rows, draws), cfg = objectives.batch(config), config.method
    x, zeros = rows["image"], lambda *args: np.zeros_like(rows["image"])
    bare = oracle.Bare(zeros, lambda *args: (x, x))
    t = oracle.meanflow(bare, rows | {"null": 7}, {}, draws, cfg)["t"]
    inside = (t >= cfg.guidance_start) & (t <= cfg.guidance_end)
    assert inside.any() and not inside.all()


def test_report_is_one_file_with_plots(tmp_path):
    path = tmp_path / "report.html"
    assert check.main(["--only", "golden/ema_lr_optim/lr", "--report", str(path)]) == 0
    page = path.read_text()
    assert page.count("data:image/png;base64,") == 2 and "golden/ema_lr_optim/lr/pymf" in page
    assert "http" not in page


def test_unwritable_json():
    with pytest.raises(UserError, match="cannot write"):
        check.main(["--only", "lr/pymf", "--json", str(pathlib.Path("no") / "such" / "directory.json")])
