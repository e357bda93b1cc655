"""Cost of running a training step on several CPU devices, and a check that the result stays the same.

    python benchmarks/scaling.py --framework=jax --devices 1 2 4
    python benchmarks/scaling.py --framework=torch --devices 1 2 --fsdp --json scaling.json

The devices share the same batch and the same cores, so the time relative to one device is the overhead of dividing the
work.  JAX uses fake devices in one process, all on the same threads; PyTorch uses one torchrun process per device
(gloo), each with its share of the threads.  Each configuration is measured in separate processes.
"""

import argparse
import os
import statistics

from tqdm import tqdm

from benchmarks import cases, memory, table
from benchmarks.step import add_common, describe, make_config
from meanflow.config import checks
from meanflow.errors import exit_on_user_error

COMPARED = ("loss", "raw_error", "grad_norm")
COLUMNS = {
    "devices": ("case", "{}"),
    "median s": ("median_s", "{:.4g}"),
    "over one device": ("ratio", "{:.3f}"),
    "step 1, relative difference": ("difference_first", "{:.1e}"),
    "step 3, relative difference": ("difference_last", "{:.1e}"),
    "all-reduces": ("all_reduces", "{}"),
    "MiB all-reduced": ("all_reduced_bytes", "MiB"),
    "other collectives": ("other_collectives", "{}"),
    "communication s": ("communication_s", "{:.4g}"),
    "hidden by backward": ("hidden", "{:.0%}"),
}


def run(framework, config, num_devices, runs):
    """Return the figures of a step on several devices, measured in separate processes."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    argv = ["-m", "benchmarks.jax_steps"]
    if framework == "torch":
        env["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // num_devices))
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_devices}"]
        argv = [*torchrun, "-m", "benchmarks.torch_steps"]
    return memory.run(argv, config, num_devices, runs, env=env)


def row(name, figures, one):
    """Return the figures of a row.  one: the figures of a single device."""
    median = statistics.median(figures["times"])
    first, last = (difference(figures["metrics"][i], one["metrics"][i]) for i in (0, -1))
    found = {"case": name, "median_s": median, "ratio": median / statistics.median(one["times"])}
    found |= {"difference_first": first, "difference_last": last, **figures}
    if "collectives" in figures:
        kinds = dict(figures["collectives"])
        reduced = kinds.pop("all-reduce", {"count": 0, "bytes": 0})
        others = ", ".join(f"{kind} {c['count']} ({c['bytes'] / 2**20:.1f} MiB)" for kind, c in kinds.items())
        found |= {"all_reduces": reduced["count"], "all_reduced_bytes": reduced["bytes"]}
        found["other_collectives"] = others or "none"
    elif figures["overlap"]:
        times = figures["overlap"]
        found |= {"all_reduces": times["all_reduces"], "communication_s": times["communication_s"]}
        found["hidden"] = times["both_s"] / times["communication_s"] if times["communication_s"] else 0.0
    return found


def difference(metrics, reference):
    """Return the largest relative difference of the scalars that must agree."""
    return max(abs(metrics[name] - reference[name]) / abs(reference[name]) for name in COMPARED)


def main(argv=None):
    """Parse the command line, measure, print and write.  Raises UserError for a wrong flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument(
        "--devices", type=int, nargs="+", help="numbers of devices; by default 1 2 4 in JAX, 1 2 in PyTorch"
    )
    parser.add_argument("--fsdp", action="store_true", help="also with parameters sharded over all devices")
    args = parser.parse_args(argv)
    config = make_config(args, args.batch, args.patch)
    devices = args.devices or {"jax": [1, 2, 4], "torch": [1, 2]}[args.framework]
    wanted = [("1", 1, 1)] + [(str(num), num, 1) for num in devices if num > 1]
    wanted += [(f"{num}, FSDP", num, num) for num in devices if num > 1 and args.fsdp]
    for _, num, _ in wanted:
        checks.check_divisible(config, num, "devices")
    rows, one = [], None
    for name, num, fsdp in tqdm(wanted, "devices"):
        figures = run(args.framework, cases.make_config(config, {"train.fsdp": fsdp}), num, args.runs)
        one = one or figures
        rows.append(row(name, figures, one) | {"devices": num, "fsdp": fsdp, "framework": args.framework})
    table.write(rows, describe(args, config), args, COLUMNS)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
