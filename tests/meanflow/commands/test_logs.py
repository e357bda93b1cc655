"""What a run leaves behind, and that a resumed run leaves the same."""

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from meanflow import console_log
from meanflow.commands import logs
from meanflow.errors import UserError


@pytest.fixture
def console(caplog):
    """Lines shown on the console; absl's own logger does not pass them on to pytest."""
    logger = logging.getLogger("absl")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def log(tmp_path):
    console_log.setup_logging()
    log = logs.MetricLog(tmp_path)
    yield log
    log.close()


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def events(tmp_path):
    return event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()


def test_scalars_go_to_three_places(tmp_path, log, console):
    log.write(100, {"loss": np.float32(0.25), "rate": 3})
    assert lines(tmp_path) == [{"step": 100, "loss": 0.25, "rate": 3.0}]
    assert "[100] loss=0.25, rate=3" in console.text
    log.flush()
    assert set(events(tmp_path).Tags()["tensors"]) == {"loss", "rate"}
    assert [event.step for event in events(tmp_path).Tensors("loss")] == [100]


@pytest.mark.parametrize("channels", [1, 3])
def test_image(tmp_path, log, channels):
    log.image(7, "samples", np.zeros((5, 6, channels), np.uint8))
    log.flush()
    (event,) = events(tmp_path).Tensors("samples")
    assert event.step == 7
    assert event.tensor_proto.string_val[:2] == [b"6", b"5"]


def test_rewind_leaves_the_file_of_an_unbroken_run(tmp_path, log):
    for step in (1, 2, 3):
        log.write(step, {"loss": step})
    unbroken = (tmp_path / "metrics.jsonl").read_text()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    log.rewind(1)
    assert [line["step"] for line in lines(tmp_path)] == [1]
    log.write(2, {"loss": 2})
    log.write(3, {"loss": 3})
    assert (tmp_path / "metrics.jsonl").read_text() == unbroken


def test_rewind_drops_the_lines_of_a_step_that_will_be_written_again(tmp_path, log):
    for step in (1, 2):
        log.write(step, {"loss": step})
        log.write(step, {"fid": step})
    log.rewind(2, "loss")
    assert lines(tmp_path) == [{"step": 1, "loss": 1}, {"step": 1, "fid": 1}, {"step": 2, "loss": 2}]


def test_rewind_names_a_damaged_line(tmp_path, log):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 2"):
        log.rewind(1)


@pytest.mark.parametrize("tail", [b'{"step": 2, "lo', b"\0" * 500, b'{"step": 2, "lo' + b"\0" * 500, b"\xff\xfe", b""])
def test_rewind_drops_what_a_kill_or_a_power_loss_leaves(tmp_path, log, tail):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + tail)
    log.rewind(1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'


def test_rewind_keeps_a_whole_last_line_without_an_end(tmp_path, log):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}')
    log.rewind(2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    "damage",
    [b"\xff\x00\xfe", b"", b"[1]", b"7", b'{"step": "1"}', b'{"step": null}', b"{}", b"\0" * 500, b"[" * 100_000],
)
def test_rewind_names_any_other_damage_in_one_short_line(tmp_path, log, damage):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 2}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 2 is not a log line: .*; delete that line") as error:
        log.rewind(1)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    assert damage in (tmp_path / "metrics.jsonl").read_bytes()


def test_what_stands_where_the_logs_belong(tmp_path, log):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot read .*metrics.jsonl: Is a directory; move it away"):
        log.rewind(1)
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl: Is a directory"):
        log.write(1, {"loss": 1})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").touch()
    with pytest.raises(UserError, match="cannot write .*run/tensorboard: File exists"):
        logs.MetricLog(tmp_path / "run")


def test_an_inactive_log_does_nothing(tmp_path):
    log = logs.MetricLog(tmp_path / "run", active=False)
    log.write(1, {"loss": 1})
    log.image(1, "samples", np.zeros((4, 4, 1), np.uint8))
    log.rewind(0)
    logs.Progress(1, log)(1)
    log.flush()
    log.close()
    assert not (tmp_path / "run").exists()


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file/tensorboard"):
        logs.MetricLog(tmp_path / "file")


def test_progress(log, console, monkeypatch):
    """Reports when the time has come, and at the end."""
    monkeypatch.setattr(logs, "PROGRESS_SECONDS", 1e-9)
    progress = logs.Progress(40, log)
    progress(10)
    progress(20)
    assert "50.0% (20/40), ETA: 0m" in console.text
    assert "steps/s" in console.text
    monkeypatch.setattr(logs, "PROGRESS_SECONDS", 1e9)
    progress = logs.Progress(40, log)
    progress(38)
    progress(39)
    assert "97.5%" not in console.text
    progress(40)
    assert "100.0% (40/40)" in console.text


def test_import_is_cheap():
    """A trainer that only parses its flags, or a rank that does not log, pays for neither clu nor TensorFlow."""
    code = "import sys, meanflow.commands.logs; print(sorted({'tensorflow', 'clu', 'jax', 'torch'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
