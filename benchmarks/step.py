"""Cost of a MeanFlow training step over a plain flow-matching step of the same network, compiled, in one process.

    python benchmarks/step.py --framework=jax
    python benchmarks/step.py --framework=torch --size=S --patch=4 --batch=16 --runs=15

Steps take turns, so that each ratio is of paired runs; medians are printed as Markdown and, with --json, written.
The limit is counted in forwards F (backward = 2F): 3F for flow matching, p F for the tangent, guidance on top.
"""

import argparse
import json
import pathlib
import statistics
import time

import numpy as np
from tqdm import tqdm

from configs import base

FLOW_MATCHING = "flow matching"
GUIDANCE = ("none", "kappa0", "kappa")
NO_GUIDANCE, KAPPA_0, KAPPA = (1.0, 0.0), (3.0, 0.0), (1.0, 0.5)


def cases(shares, guidance):
    """Return {name: (p, omega, kappa, limit)}; p is the share of rows with r < t, limit the ratio of forwards."""
    table = {FLOW_MATCHING: (0.0, *NO_GUIDANCE, 1.0)}
    for p in shares:
        every = {
            "none": (*NO_GUIDANCE, (3 + p) / 3),
            "kappa0": (*KAPPA_0, (4 + p) / 3),
            "kappa": (*KAPPA, (4 + 2 * p) / 3),
        }
        table |= {f"p={p}, guidance {name}": (p, *every[name]) for name in guidance}
    return table


def make_config(args, p, omega, kappa):
    """Return the config of one case; flow matching is MeanFlow on flow rows alone."""
    config = base.get_config()
    config.model.update(base.DIT_SIZES[args.size], patch_size=args.patch, input_size=32, channels=4, num_classes=1000)
    config.model.compute_dtype = args.dtype
    config.method.flow_fraction = 1 - p
    config.method.guidance = (omega, kappa) != NO_GUIDANCE
    config.method.omega, config.method.kappa = omega, kappa
    config.train.batch_size = args.batch
    return config


def jax_step(config, batch):
    """Return a function that runs one more JAX step and waits for it."""
    import jax

    from jax_impl import step

    jax.config.update("jax_default_matmul_precision", config.train.matmul_precision)
    mesh = step.make_mesh(config)
    graphdef, state = step.create_state(config, mesh)
    train_step, batch = step.make_train_step(config, graphdef, mesh), step.put_batch(batch, mesh)
    holder = [state]

    def run():
        holder[0], metrics = train_step(holder[0], batch)
        jax.block_until_ready((holder[0], metrics))

    return run


def torch_step(config, batch):
    """Return a function that runs one more PyTorch step and waits for it."""
    import torch

    from torch_impl import step
    from torch_impl.devices import choose_device

    device = choose_device()
    torch._dynamo.config.recompile_limit = 64  # each case compiles its own
    holder = [step.create_state(config, None, device)]
    train_step, batch = step.make_train_step(config), step.put_batch(batch, device)

    def run():
        holder[0], metrics = train_step(holder[0], batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return metrics

    return run


def measure(args):
    """Return {case: {median seconds, ratio, limit}}: the ratio is the median of the paired ratios."""
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.standard_normal((args.batch, 32, 32, 4), np.float32),
        "label": rng.integers(0, 1000, args.batch).astype(np.int32),
    }
    make = {"jax": jax_step, "torch": torch_step}[args.framework]
    table = cases(args.shares, args.guidance)
    steps = {}
    for name, (p, omega, kappa, _) in tqdm(table.items(), "compiling"):
        steps[name] = make(make_config(args, p, omega, kappa), batch)
        for _ in range(2):
            steps[name]()
    times = {name: [] for name in steps}
    for _ in tqdm(range(args.runs), "measuring"):
        for name, run in steps.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {
        name: {
            "median_s": statistics.median(times[name]),
            "ratio": statistics.median(a / b for a, b in zip(times[name], times[FLOW_MATCHING], strict=True)),
            "limit": table[name][-1],
        }
        for name in steps
    }


def main():
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("jax", "torch"), required=True)
    parser.add_argument("--size", choices=tuple(base.DIT_SIZES), default="S", help="DiT size")
    parser.add_argument("--patch", type=int, default=4, help="side of a patch of the 32x32x4 latent")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25], help="shares p of rows with r < t")
    parser.add_argument("--guidance", nargs="+", choices=GUIDANCE, default=list(GUIDANCE), help="kinds of guidance")
    parser.add_argument("--dtype", default="float32", help="of matmuls: float32 or bfloat16")
    parser.add_argument("--runs", type=int, default=15, help="paired runs")
    parser.add_argument("--json", type=pathlib.Path, help="also write the table here")
    args = parser.parse_args()
    result = measure(args)
    print(f"DiT-{args.size}/{args.patch}, 32x32x4, batch {args.batch}, {args.dtype}, {args.framework}\n")
    print("| step | median s | ratio | limit |\n|---|---|---|---|")
    for name, row in result.items():
        print(f"| {name} | {row['median_s']:.3f} | {row['ratio']:.3f} | {row['limit']:.3f} |")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
