"""Trains several runs in one go, as torch_impl/train.py would each; started by test_processes.py under torchrun too.

run_cases.py CASES.json      [[workdir, {dotted option: value}], ...]
"""

import json
import sys

import torch.distributed as dist

from configs import digits
from meanflow.config import resolve
from torch_impl import train
from torch_impl.devices import start_torch


def main():
    """Run the cases in order."""
    with open(sys.argv[1]) as file:
        cases = json.load(file)
    device = start_torch(digits.get_config())
    for workdir, changes in cases:
        config = digits.get_config()
        for name, value in changes.items():
            config.update_from_flattened_dict({name: tuple(value) if isinstance(value, list) else value})
        train.train(resolve.check(config), workdir, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
