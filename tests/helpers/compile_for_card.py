"""Compiles training steps of tiny networks for H100s that are not there, and prints a JSON object for each.

    compile_for_card.py NETWORK,METHOD,KERNEL,HOSTS,DEVICES,FSDP[,MUTATION]...

custom_calls: {target: number}; collectives: see `jax_steps.collectives`; during: collectives of gradients that start
before the last matmul.
"""

import collections
import json
import re
import sys

import jax
import tiny

from benchmarks import jax_steps
from benchmarks.rehearsal import cards, jax_step
from jax_impl.models import attention, dit

MATMUL = r"custom-call\(.*custom_call_target=\"__cublas|custom-call\(.*custom_call_target=\"__cudnn|= \S+ dot\("
MUTATIONS = {
    "default_backend": lambda: setattr(attention, "platform", jax.default_backend),
    "not_in_turn": lambda: setattr(dit, "in_turn", lambda blocks, tape: ((block, lambda x: x) for block in blocks)),
}


def measure(network, method, kernel, hosts, devices, fsdp):
    """Compile the step; count."""
    changes = {"train.batch_size": 64, "train.ema_decays": (0.9,), "train.fsdp": fsdp}
    changes |= {"model.compute_dtype": "bfloat16"}
    if network in ("dit", "imf_dit", "dmf_dit"):
        changes |= {"model.attention": kernel} | ({"model.depth": 2} if network == "dit" else {})
    if network == "imf_dit":
        changes |= {"model.num_time_tokens": 4}  # cuDNN wants an even number in all
    config = tiny.make(network, method, changes)
    found = jax_step.describe(cards.find("h100"), devices, hosts)
    program = jax_step.compile_step(config, found)[0].as_text()
    entry = program[program.index("\nENTRY") :].splitlines()
    last = max(i for i, line in enumerate(entry) if re.search(MATMUL, line))
    moves = [i for i, line in enumerate(entry) if re.search(r" (all-reduce|reduce-scatter)(-start)?\(", line)]
    targets = re.findall(r'custom_call_target="([^"]*)"', program)
    return {
        "custom_calls": collections.Counter(targets), "collectives": jax_steps.collectives(program),
        "during": sum(i < last for i in moves),
    }  # fmt: skip


if __name__ == "__main__":
    for case in sys.argv[1:]:
        network, method, kernel, hosts, devices, fsdp, *mutations = case.split(",")
        for name in mutations:
            MUTATIONS[name]()
        print(json.dumps(measure(network, method, kernel, int(hosts), int(devices), int(fsdp))), flush=True)
