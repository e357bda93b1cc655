"""Trains several runs in one go, as torch_impl/train.py would each; started by test_processes.py under torchrun too.

run_cases.py CASES.json      [[workdir, {dotted option: value}], ...]
"""

import json
import pathlib
import sys

import torch.distributed as dist

from meanflow.config import checks, options, store
from torch_impl import train
from torch_impl.devices import start_torch

TINY = pathlib.Path(__file__).parents[1] / "helpers" / "tiny.py"


def main():
    """Run the cases in order."""
    with open(sys.argv[1]) as file:
        cases = json.load(file)
    device = start_torch(options.get_config())
    for workdir, changes in cases:
        changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
        network, method = changes.pop("model.name", "dit"), changes.pop("method.name", "meanflow")
        config = store.load_file(f"{TINY}:{network},{method}")
        config.update_from_flattened_dict(changes)
        train.train(checks.check(config), workdir, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
