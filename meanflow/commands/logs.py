"""Logging shared by both trainers: TensorBoard, the console and metrics.jsonl.

clu and TensorFlow take seconds to import, so they are imported only when a log is opened.
"""

import json
import operator
import os
import pathlib
from typing import Any

import numpy as np
from absl import logging

from meanflow import files, tensorflow_logging
from meanflow.errors import UserError

FILE_NAME = "metrics.jsonl"
TENSORBOARD = "tensorboard"
PROGRESS_SECONDS = 30.0
SHOWN = 80  # bytes of a damaged line shown in the error


class MetricLog:
    """The log of one run in its work directory.

    Scalars go to WORKDIR/metrics.jsonl (one object per line, {"step": 100, "loss": ...}), to TensorBoard event files in
    WORKDIR/tensorboard and to the console.  With active=False (all ranks except the first) every method is a no-op.
    Raises UserError if the directory cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike, active: bool = True):
        self.active = active
        self.tensorboard: Any = None  # clu's writer, or None if inactive
        self._path = pathlib.Path(workdir) / FILE_NAME
        if active:
            self._open(pathlib.Path(workdir) / TENSORBOARD)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log scalars (anything `float` accepts) at `step`.  The line is on disk when this returns."""
        if not self.active:
            return
        values = {name: float(value) for name, value in values.items()}
        try:
            with open(self._path, "a") as file:
                file.write(json.dumps({"step": int(step)} | values) + "\n")
        except OSError as error:
            raise files.cannot_write(self._path, error) from error
        self.tensorboard.write_scalars(step, values)
        self._console.write_scalars(step, values)

    def show(self, step: int, values: dict[str, float]) -> None:
        """Show scalars on the console alone."""
        if self.active:
            self._console.write_scalars(step, values)

    def image(self, step: int, name: str, grid: np.ndarray) -> None:
        """Log an image, uint8 [H W 1] or [H W 3], to TensorBoard."""
        if self.active:
            self.tensorboard.write_images(step, {name: grid[None]})

    def rewind(self, step: int, wanted: str = "") -> None:
        """Drop lines of metrics.jsonl after `step`, so that a resumed run ends up with the file of an unbroken one.

        wanted: also drops lines at `step` itself that lack this name, since they will be written again.
        Also drops a truncated last line (the process was killed) and trailing zero bytes (power loss).
        TensorBoard's files are left alone, so repeated steps appear twice.  Raises UserError for any other line that is
        not a log line, or if the file cannot be read.
        """
        if not self.active or not self._path.exists():
            return
        try:
            *lines, last = self._path.read_bytes().rstrip(b"\0").split(b"\n")
        except OSError as error:
            raise UserError(f"cannot read {self._path}: {error.strerror}; move it away") from error
        if last.endswith(b"}"):  # complete except for its newline
            lines.append(last)
        elif last:
            logging.warning("%s: dropped an unfinished last line of %d bytes", self._path, len(last))
        steps = [self._step_of(line, number) for number, line in enumerate(lines, 1)]
        kept = [
            line + b"\n"
            for line, own in zip(lines, steps, strict=True)
            if own < step or (own == step and (not wanted or wanted in json.loads(line)))
        ]
        files.replace_bytes(self._path, b"".join(kept))

    def flush(self) -> None:
        """Flush TensorBoard's files."""
        if self.active:
            self.tensorboard.flush()

    def close(self) -> None:
        """Flush and close the log."""
        if self.active:
            self.tensorboard.close()

    def _open(self, directory: pathlib.Path) -> None:
        tensorflow_logging.silence_tensorflow()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise files.cannot_write(directory, error) from error
        from clu import metric_writers

        self.tensorboard = metric_writers.SummaryWriter(str(directory))
        self._console = metric_writers.LoggingWriter()

    def _step_of(self, line: bytes, number: int) -> int:
        try:
            return operator.index(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:  # ValueError: not text, or not JSON
            shown = repr(line if len(line) <= SHOWN else line[:SHOWN] + b"...").removeprefix("b")
            raise UserError(
                f"{self._path}, line {number} is not a log line: {shown}; delete that line, or move the file away"
            ) from error


class Progress:
    """Reports progress on the console (steps/s, percentage, ETA) and rates to console and TensorBoard.

    Not to metrics.jsonl, which a resumed run leaves as an unbroken one does.
    """

    def __init__(self, num_steps: int, log: MetricLog, per_step: dict[str, float] | None = None):
        """num_steps: optimizer steps of the whole run.  log: if inactive, nothing is reported.

        per_step: what a step gets done, by the name of its rate per second, such as examples_per_sec.
        """
        self._report = None
        if log.active:
            from clu import periodic_actions

            rates: Any = _Rates(log, per_step or {})
            self._report = periodic_actions.ReportProgress(
                num_train_steps=num_steps, writer=rates, every_secs=PROGRESS_SECONDS
            )

    def __call__(self, step: int) -> None:
        """Call after every step with the number of steps done; reports every `PROGRESS_SECONDS` and at the end."""
        if self._report is not None:
            self._report(step)


class _Rates:
    """A writer for clu's progress that adds other rates to its steps per second."""

    def __init__(self, log, per_step):
        self._log, self._per_step = log, per_step

    def write_scalars(self, step, scalars):
        rates = {name: amount * scalars.get("steps_per_sec", 0.0) for name, amount in self._per_step.items()}
        if "steps_per_sec" in scalars and rates:
            self._log.show(step, rates)
            scalars = scalars | rates
        self._log.tensorboard.write_scalars(step, scalars)
