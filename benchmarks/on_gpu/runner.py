"""Runs the pieces side by side within a budget; what is timed runs alone on the card, at the end."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import NamedTuple

from tqdm import tqdm

from benchmarks.on_gpu.pieces import Piece
from benchmarks.on_gpu.timed import READY

MEASURING = 10  # seconds that a timed piece needs once it is ready
SAID = 15  # lines of errors that are kept
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}  # several share the card
THREADS = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")  # each piece gets its share of the cores
COMPILED = "JAX_COMPILATION_CACHE_DIR"  # a run that is killed, resumed and sampled is compiled once


class Row(NamedTuple):
    """What became of a piece."""

    name: str
    status: str  # passed | failed | out of time | skipped
    seconds: float
    figures: dict  # what it printed
    said: str  # its last lines, or why it did not run


class Running:
    """A piece that runs in a process group of its own."""

    def __init__(self, piece: Piece, logs: pathlib.Path, environment: dict[str, str]):
        self.piece, self.began, self.ready, self.measuring = piece, time.monotonic(), False, False
        self.preparing = 0.0  # seconds until it was ready
        stem = logs / piece.name.replace("/", "_")
        self.out, self.err = stem.with_suffix(".out"), stem.with_suffix(".err")
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                piece.argv, stdin=subprocess.PIPE, stdout=out, stderr=err, env=os.environ | environment,
                start_new_session=True, cwd=pathlib.Path(__file__).parents[2], text=True,
            )  # fmt: skip

    def look(self) -> bool:
        """Notice whether it is ready to be timed, and return whether it has ended."""
        if self.piece.timed and not self.ready and READY in self.out.read_text().splitlines():
            self.ready, self.preparing = True, time.monotonic() - self.began
        return self.process.poll() is not None

    def go(self) -> None:
        """Let it measure."""
        self.measuring, self.began = True, time.monotonic()
        with contextlib.suppress(BrokenPipeError):
            print(file=self.process.stdin, flush=True)

    def late(self) -> bool:
        """Return whether it has used up its time; waiting for the card does not count."""
        waits = self.ready and not self.measuring
        limit = 6 * MEASURING if self.measuring else self.piece.limit
        return not waits and time.monotonic() - self.began > limit

    def stop(self) -> None:
        """Kill it and what it has started, if it has not ended."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()

    def row(self, status: str = "") -> Row:
        """Return what became of it."""
        lines = self.out.read_text().splitlines()
        said = "\n".join((lines + self.err.read_text().splitlines())[-SAID:])
        status = status or ("failed" if self.process.returncode else "passed")
        found = figures(lines) if status == "passed" else {}
        seconds = self.preparing  # its wait for the card does not count
        if self.measuring or not self.ready:
            seconds += time.monotonic() - self.began
        if found and self.ready:
            found["preparing_s"] = self.preparing
        return Row(self.piece.name, status, seconds, found, said)


class Card(NamedTuple):
    """What there is to run on."""

    gib: float  # of one GPU
    num_gpus: int


class Schedule:
    """Runs pieces in their order, as many at once as cores, memory and time allow."""

    def __init__(self, pieces: Sequence[Piece], card: Card, jobs: int, budget: float, logs: pathlib.Path):
        self._waiting, self._running, self._card, self._jobs, self._logs = list(pieces), [], card, jobs, logs
        share = str(max(1, (os.cpu_count() or 1) // jobs))
        self._environment = ENVIRONMENT | dict.fromkeys(THREADS, share) | {COMPILED: str(logs.parent / "compiled")}
        self._deadline, self._rows = time.monotonic() + budget, {}
        self._order = [piece.name for piece in pieces]
        self._bar = tqdm(total=len(pieces), unit="piece", disable=None)

    def run(self) -> list[Row]:
        """Return a row for each piece.  Nothing outlives the call."""
        self._logs.mkdir(parents=True, exist_ok=True)
        try:
            self._skip()
            while self._waiting or self._running:
                self._collect()
                self._give_up()
                self._start()
                self._measure()
                time.sleep(0.1)
        finally:
            for running in self._running:
                running.stop()
            self._bar.close()
        return [self._rows[name] for name in self._order]

    def _add(self, row: Row) -> None:
        self._rows[row.name] = row
        self._bar.write(f"{row.status:12} {row.seconds:5.0f} s  {row.name}")
        self._bar.update()

    def _skip(self) -> None:
        """Leave out what the machine is too small for."""
        for piece in tuple(self._waiting):
            missing = ""
            if piece.num_gpus > self._card.num_gpus:
                missing = f"needs {piece.num_gpus} GPUs"
            elif piece.gib > self._card.gib:
                missing = f"needs {piece.gib} GiB of the card"
            if missing:
                self._waiting.remove(piece)
                self._add(Row(piece.name, "skipped", 0.0, {}, missing))

    def _collect(self) -> None:
        """Take what has ended, and stop what takes too long."""
        for running in tuple(self._running):
            if running.look():
                self._end(running)
            elif running.late():
                self._end(running, "out of time")

    def _end(self, running: Running, status: str = "") -> None:
        running.stop()
        self._running.remove(running)
        self._add(running.row(status))

    def _give_up(self) -> None:
        """Near the end of the budget, stop all but what is ready to be timed; at its end, everything."""
        left = self._deadline - time.monotonic()
        ready = [running for running in self._running if running.ready]
        if left > MEASURING * len(ready):
            return
        for running in tuple(self._running):
            if left <= 0 or not running.ready:
                self._end(running, "out of time")
        for piece in self._waiting:
            self._add(Row(piece.name, "out of time", 0.0, {}, "not started: the budget was used up"))
        self._waiting.clear()

    def _start(self) -> None:
        """Start what there is room for, unless something is being timed."""
        if any(running.measuring for running in self._running):
            return
        for piece in tuple(self._waiting):
            used = sum(running.piece.gib for running in self._running)
            busy = sum(not running.ready for running in self._running)
            if busy < self._jobs and used + piece.gib <= self._card.gib:
                self._waiting.remove(piece)
                self._running.append(Running(piece, self._logs, self._environment))

    def _measure(self) -> None:
        """Let the next timed piece go once nothing else is at work."""
        if self._running and all(running.ready and not running.measuring for running in self._running):
            self._running[0].go()


def figures(lines: Sequence[str]) -> dict:
    """Return the JSON object on the last line, or the line itself."""
    last = lines[-1] if lines else ""
    try:
        found = json.loads(last)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"result": last}
