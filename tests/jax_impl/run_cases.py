"""Trains several runs in one go on four fake devices, as jax_impl/main.py would each.

run_cases.py CASES.json      {"devices": N, "cases": [[workdir, {dotted option: value}], ...]}
"""

import json
import pathlib
import sys

import jax

from jax_impl import train
from meanflow.config import checks, store

TINY = pathlib.Path(__file__).parents[1] / "helpers" / "tiny.py"


def main():
    """Run the cases in order."""
    with open(sys.argv[1]) as file:
        run = json.load(file)
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_num_cpu_devices", run["devices"])
    for workdir, changes in run["cases"]:
        changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
        network, method = changes.pop("model.name", "dit"), changes.pop("method.name", "meanflow")
        config = store.load_file(f"{TINY}:{network},{method}")
        config.update_from_flattened_dict(changes)
        train.train(checks.check(config), workdir)


if __name__ == "__main__":
    main()
