"""Trains in two processes, with and without sharded state, and in one: `python -m benchmarks.on_gpu.two FRAMEWORK DIR`.

Each process has a GPU of its own; where there is none, PyTorch's processes share the CPU.
"""

import json
import pathlib
import shutil
import socket
import subprocess
import sys

from benchmarks.on_gpu import trainer

RECIPE = "configs/digits.py"
APART = 1e-3  # of the raw error after 30 steps


def main(framework: str, directory: str) -> dict:
    """Return how far runs in two processes are from one, relative to its last raw error.  Exits if that is too far."""
    shutil.rmtree(directory, ignore_errors=True)
    found = {}
    for name, changes, processes in (("one", {}, 1), ("data", {}, 2), ("fsdp", {"train.fsdp": 2}, 2)):
        workdir = pathlib.Path(directory, name)
        argv = trainer.train(framework, RECIPE, workdir, trainer.SMALL | {"model.compute_dtype": "float32"} | changes)
        launch(framework, argv, processes)
        found[name] = trainer.check_finite(workdir, trainer.SMALL["train.steps"])["raw_error"]
    apart = {name: abs(found[name] / found["one"] - 1) for name in ("data", "fsdp")}
    if max(apart.values()) > APART:
        sys.exit(f"raw errors differ: {found}")
    return apart


def launch(framework: str, argv: list[str], processes: int) -> None:
    """Run a trainer in one or two processes."""
    if framework == "torch":
        trainer.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                     *argv[1:]])  # fmt: skip
        return
    if processes == 1:
        trainer.run(argv, CUDA_VISIBLE_DEVICES="0")
        return
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    flags = [f"--coordinator={coordinator}", "--num_processes=2"]
    first, second = (
        subprocess.Popen(["env", f"CUDA_VISIBLE_DEVICES={index}", *argv, *flags, f"--process={index}"], stderr=-1,
                         stdout=subprocess.DEVNULL, text=True)
        for index in range(2)
    )  # fmt: skip
    for process in (first, second):
        errors = process.communicate()[1]
        if process.returncode:
            sys.exit(f"exit code {process.returncode}\n{errors[-3000:]}")


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
