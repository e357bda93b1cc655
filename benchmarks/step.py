"""Cost of a training step relative to a plain flow-matching step of the same network, compiled, in one process.

    python benchmarks/step.py --framework=jax
    python benchmarks/step.py --framework=jax --system=improved          (or decoupled, rectified)
    python benchmarks/step.py --framework=torch --size=S --patch=4 --batch=16 --runs=15 --eager
    python benchmarks/step.py --framework=jax --config=configs/meanflow_cifar10.py:v1 --set model.width=32
    python benchmarks/step.py --framework=jax --batches 4 8 16 --patches 8 4 2 --plot step.png --json step.json

Steps take turns, so ratios are of paired runs; medians are printed as Markdown.  The limit counts forwards F (backward
= 2F): 3F for flow matching, p F for the tangent, plus guidance; improved MeanFlow adds 3F times the fraction of F in
its second head; decoupled MeanFlow takes 3F for each of two terms.  FLOPs are counted by the framework and also derived
from the limit, with F counted from one forward.  FLOP/s use the derived count, and are compared with a large square
matmul of the same dtype, which takes turns with the steps.  "Ratio at matmul rate" is the ratio if all work beyond flow
matching ran at that rate.
"""

import argparse

from benchmarks import cases, measure, table
from meanflow.config import paths, store
from meanflow.config.networks import DIT_SIZES
from meanflow.errors import UserError, exit_on_user_error


def parse(argv=None):
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--patches", type=int, nargs="+", default=(), help="patch sizes; one table each")
    parser.add_argument("--batches", type=int, nargs="+", default=(), help="batch sizes; one table each")
    parser.add_argument("--shares", type=float, nargs="+", default=(), help="fractions p of rows with r < t")
    parser.add_argument("--guidance", nargs="+", choices=cases.GUIDANCE, help="kinds of guidance; by default all")
    parser.add_argument("--eager", action="store_true", help="PyTorch: also measure each step without torch.compile")
    parser.add_argument("--remat", action="store_true", help="also measure each step with train.remat")
    parser.add_argument("--memory", action="store_true", help="measure the memory of each step in a separate process")
    parser.add_argument("--plot", type=paths.written, help="plot time against batch size and tokens to this PNG")
    return parser.parse_args(argv)


def add_common(parser):
    """Add the flags that all benchmarks share."""
    parser.add_argument("--framework", choices=("jax", "torch"), required=True)
    parser.add_argument("--config", metavar="FILE", help="measure a recipe, FILE.py[:variant], instead of --system")
    parser.add_argument("--system", choices=cases.SYSTEMS, default="meanflow", help="a transformer on 32x32x4 latents")
    parser.add_argument("--size", choices=tuple(DIT_SIZES), default="S", help="DiT size")
    parser.add_argument("--head_depth", type=int, default=8, help="improved: blocks of a head, included in the depth")
    parser.add_argument("--patch", type=int, help="patch size; by default 4, or that of the recipe")
    parser.add_argument("--set", nargs="+", default=(), metavar="OPTION=VALUE", help="options of the config")
    parser.add_argument("--batch", type=int, default=16, help="batch size")
    parser.add_argument(
        "--dtype", help="dtype of matmuls, float32 or bfloat16; by default float32, or that of the recipe"
    )
    parser.add_argument("--runs", type=int, default=15, help="number of runs; figures are medians")
    parser.add_argument("--markdown", type=paths.written, metavar="FILE", help="also write the table here")
    parser.add_argument("--json", type=paths.written, metavar="FILE", help="also write the figures here")


def make_config(args, batch, patch=None):
    """Return the config that the command line describes, with a batch size and a patch size."""
    system = None if args.config else cases.system_config(args.system, args.size, args.head_depth)
    config = store.load_file(args.config) if system is None else system
    if patch:
        config.model.patch_size = patch
    config.model.compute_dtype = args.dtype or config.model.compute_dtype
    config.train.batch_size = batch
    return cases.override(config, args.set)


def describe(args, *configs):
    """Return a one-line description of what is measured, with all batch and patch sizes."""
    c = configs[0].model
    batches = " and ".join(dict.fromkeys(str(config.train.batch_size) for config in configs))
    sizes = [config.model.patch_size if "patch_size" in config.model else 1 for config in configs]
    network = args.config or f"{configs[0].method.name}, DiT-{args.size}/{' and '.join(map(str, dict.fromkeys(sizes)))}"
    parts = (network, f"{c.input_size}x{c.input_size}x{c.channels}", f"batch {batches}")
    return ", ".join((*parts, c.compute_dtype, *args.set, args.framework))


def main(argv=None):
    """Parse the command line, measure, print and write.  Raises UserError for a wrong flag."""
    args = parse(argv)
    if args.eager and args.framework == "jax":
        raise UserError("--eager is for PyTorch: JAX always compiles a step")
    variants = [name for name in ("eager", "remat") if getattr(args, name)]
    configs = [
        make_config(args, batch, patch)
        for batch in args.batches or [args.batch]
        for patch in args.patches or [args.patch]
    ]
    points = [cases.make_cases(config, args.shares, args.guidance or cases.GUIDANCE, variants) for config in configs]
    rows = measure.sweep(args.framework, points, args.runs, args.memory)
    setting = describe(args, *configs)
    table.write(rows, setting, args)
    if args.plot:
        table.plot(rows, args.plot, setting)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
