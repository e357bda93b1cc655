"""Cost of a training step over a plain flow-matching step of the same network, compiled, in one process.

    python benchmarks/step.py --framework=jax
    python benchmarks/step.py --framework=jax --system=improved          (or decoupled)
    python benchmarks/step.py --framework=torch --size=S --patch=4 --batch=16 --runs=15

Steps take turns, so that each ratio is of paired runs; medians are printed as Markdown and, with --json, written.
The limit is counted in forwards F (backward = 2F): 3F for flow matching, p F for the tangent, guidance on top; in
improved MeanFlow 3F more for the part of F that its second head is; in decoupled MeanFlow 3F for each of two terms.
"""

import argparse
import json
import pathlib
import statistics
import time

import numpy as np
from tqdm import tqdm

from configs import base, resolve

FLOW_MATCHING = "flow matching"
GUIDANCE = ("none", "kappa0", "kappa")
OPTIONS_OF = {  # of config.method, by the kind of guidance
    "none": {"guidance": False}, "kappa0": {"omega": 3.0, "kappa": 0.0}, "kappa": {"omega": 1.0, "kappa": 0.5}
}  # fmt: skip


def meanflow_cases(args):
    """Return {name: (options of the config by dotted name, limit)}; p is the share of rows with r < t.

    Flow matching is MeanFlow on flow rows alone, without guidance.  The limit is the ratio of forwards.
    """
    table = {FLOW_MATCHING: ({"method.flow_fraction": 1.0, "method.guidance": False}, 1.0)}
    for p in args.shares:
        limits = {"none": (3 + p) / 3, "kappa0": (4 + p) / 3, "kappa": (4 + 2 * p) / 3}
        for kind in GUIDANCE if args.guidance is None else set(GUIDANCE) & set(args.guidance):
            options = {f"method.{name}": value for name, value in OPTIONS_OF[kind].items()}
            table[f"p={p}, guidance {kind}"] = ({"method.flow_fraction": 1 - p} | options, limits[kind])
    return table


def improved_cases(args):
    """Return the same of improved MeanFlow.

    Flow matching is one head on flow rows alone: of as many blocks as u has, without guidance and tangent.
    """
    of_one_head = {"model.head_depth": 0, "method.guidance": False, "method.flow_fraction": 1.0}
    table = {FLOW_MATCHING: (of_one_head, 1.0)}
    head = args.head_depth / base.DIT_SIZES[args.size]["depth"]
    for p in args.shares:
        for name, guided, limit in (("none", False, 3 + 2 * p + 3 * head), ("all", True, 4 + 2 * p + 3 * head)):
            options = {"method.flow_fraction": 1 - p, "method.guidance": guided}
            if name in (args.guidance or name):
                table[f"p={p}, guidance {name}"] = (options, limit / 3)
    return table


def decoupled_cases(args):
    """Return the same of decoupled MeanFlow, against the flow model that it starts from."""
    flow = {"model.name": "dit", "model.interval_embedder": False, "method.name": "flow"}
    kinds = {"none": ("default", 7 / 3), "all": ("mg", 10 / 3)}
    return {FLOW_MATCHING: (flow, 1.0)} | {
        f"guidance {kind}": ({"method.guidance_type": kind}, limit)
        for name, (kind, limit) in kinds.items()
        if name in (args.guidance or name)
    }


CASES = {"meanflow": meanflow_cases, "improved": improved_cases, "decoupled": decoupled_cases}


def make_config(args, options):
    """Return the config of one case."""
    config = base.get_config()
    config.model.update(base.DIT_SIZES[args.size], patch_size=args.patch, input_size=32, channels=4, num_classes=1000)
    config.model.compute_dtype = args.dtype
    if args.system == "improved":
        config.method.name, config.model.name = "improved", "imf_dit"
        config.model.update(mlp_ratio=8 / 3, head_depth=args.head_depth)
    if args.system == "decoupled":
        config.method.name, config.model.name = "decoupled", "dmf_dit"
        config.model.dmf_depth = config.model.depth * 5 // 7  # 20 of 28 in XL
        config.method.update(omega=0.6, guidance_end=0.7, time_mean=(0.4, -1.2))
    config.train.batch_size = args.batch
    config.update_from_flattened_dict(options)
    return resolve.check(config)


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
    table = CASES[args.system](args)
    steps = {}
    for name, (options, _) in tqdm(table.items(), "compiling"):
        steps[name] = make(make_config(args, options), batch)
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
    parser.add_argument("--system", choices=tuple(CASES), default="meanflow")
    parser.add_argument("--size", choices=tuple(base.DIT_SIZES), default="S", help="DiT size")
    parser.add_argument("--head_depth", type=int, default=8, help="improved: blocks of a head, of those of the size")
    parser.add_argument("--patch", type=int, default=4, help="side of a patch of the 32x32x4 latent")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--shares", type=float, nargs="+", default=None, help="shares p of rows with r < t")
    parser.add_argument("--guidance", nargs="+", choices=(*GUIDANCE, "all"), help="kinds; every one by default")
    parser.add_argument("--dtype", default="float32", help="of matmuls: float32 or bfloat16")
    parser.add_argument("--runs", type=int, default=15, help="paired runs")
    parser.add_argument("--json", type=pathlib.Path, help="also write the table here")
    args = parser.parse_args()
    args.shares = args.shares or [0.5 if args.system == "improved" else 0.25]
    result = measure(args)
    print(f"{args.system}, DiT-{args.size}/{args.patch}, 32x32x4, batch {args.batch}, {args.dtype}, {args.framework}\n")
    print("| step | median s | ratio | limit |\n|---|---|---|---|")
    for name, row in result.items():
        print(f"| {name} | {row['median_s']:.3f} | {row['ratio']:.3f} | {row['limit']:.3f} |")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
