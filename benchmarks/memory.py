"""Memory of one training step, measured in a separate process: `python -m benchmarks.memory jax|torch CONFIG.json`.

Prints one JSON object, in bytes.  peak_bytes: planned by XLA, or allocated on a GPU by PyTorch; for PyTorch on a CPU,
the state plus the growth of resident memory in one step.  rss_peak_bytes, rss_growth_bytes: resident memory on a CPU.
Growth only shows in a fresh process, because the allocator reuses memory freed by earlier steps.
"""

import ctypes
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from benchmarks import cases
from meanflow.config import store

# Each larger block then goes back to the system when it is freed.  Otherwise fragments of the heap count, by a quarter
# of the peak.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}
WARM_UP = 2  # unmeasured steps before the measured one


def of_step(framework, config):
    """Return the memory of a step, measured in a separate process; see `run`."""
    return run(["-m", "benchmarks.memory", framework], config, env=os.environ | MALLOC)


def run(argv, config, *more, env=None):
    """Return the JSON that `python *argv CONFIG.json *more` prints.  Raises RuntimeError with stderr if it fails."""
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "config.json"
        path.write_text(store.to_json(config))
        argv = [sys.executable, *argv, str(path), *map(str, more)]
        done = subprocess.run(argv, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(framework, config):
    """Return the memory of a step, measured in this process."""
    steps = importlib.import_module(f"benchmarks.{framework}_steps")
    steps.start(config)
    step = steps.Step(config, cases.make_batch(config))
    for _ in range(WARM_UP):
        step.run()
    figures = step.memory()
    if steps.device()[0] == "cpu":
        figures |= resident(step.run)
        grown = {"peak_bytes": figures["state_bytes"] + figures["rss_growth_bytes"], "peak_kind": "state and growth"}
        figures = grown | figures
    return figures


def resident(run):
    """Return bytes by name: peak resident memory during `run()`, and its growth from before the call."""
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = status("VmRSS")
    run()
    peak = status("VmHWM")
    return {"rss_peak_bytes": peak, "rss_growth_bytes": peak - before}


def status(name):
    """Return a size from /proc/self/status in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    [kib] = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(kib) * 1024


if __name__ == "__main__":
    framework, path = sys.argv[1:]
    print(json.dumps(measure(framework, store.from_json(pathlib.Path(path).read_text()))))
