"""Trains recipes of configs/digits.py for a few steps: `python -m ... FRAMEWORK DTYPE DIR RECIPE...`.

Recipes are trained one after the other.  `dmf` starts from `flow`; `remeanflow` learns couplings of `edm2_flow`.
"""

import json
import pathlib
import shutil
import sys
from typing import Any

from benchmarks.on_gpu import trainer

COUPLINGS = ("--num_samples=128", "--steps=2", "--batch_size=64")


def main(framework: str, dtype: str, directory: str, *recipes: str) -> dict:
    """Train the recipes, and return the last loss of each by name."""
    losses = {}
    root = pathlib.Path(directory, dtype, framework)
    for recipe in recipes:
        workdir = root / (recipe or "dit")
        changes: dict[str, Any] = trainer.SMALL | {"model.compute_dtype": dtype}
        shutil.rmtree(workdir, ignore_errors=True)
        if framework == "torch":
            changes["train.compile_backend"] = "inductor"  # where recipes save time on a CPU
        if recipe == "dmf":
            changes["train.load_from"] = root / "flow"
        if recipe == "remeanflow":
            couplings = root / "couplings"
            shutil.rmtree(couplings, ignore_errors=True)
            argv = (f"--teacher={root / 'edm2_flow'}", f"--output={couplings}", *COUPLINGS)
            trainer.run(trainer.command(framework, "reflow", *argv))
            changes |= {"data.name": couplings, "method.stage1_steps": 15}
        path = f"configs/digits.py:{recipe}" if recipe else "configs/digits.py"
        trainer.run(trainer.train(framework, path, workdir, changes))
        losses[recipe or "dit"] = trainer.check_finite(workdir, changes["train.steps"])["loss"]
    return losses


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
