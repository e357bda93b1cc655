"""Trains several runs in one go on four fake devices, as jax_impl/main.py would each.

run_cases.py CASES.json      {"devices": N, "cases": [[workdir, {dotted option: value}], ...]}
"""

import json
import sys

import jax

from configs import digits
from jax_impl import train
from meanflow.config import resolve


def main():
    """Run the cases in order."""
    with open(sys.argv[1]) as file:
        run = json.load(file)
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_num_cpu_devices", run["devices"])
    for workdir, changes in run["cases"]:
        config = digits.get_config()
        for name, value in changes.items():
            config.update_from_flattened_dict({name: tuple(value) if isinstance(value, list) else value})
        train.train(resolve.check(config), workdir)


if __name__ == "__main__":
    main()
