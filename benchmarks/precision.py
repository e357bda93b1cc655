"""Errors of u, du/dt, target and gradient in reduced precision relative to float64, with no weights at zero.

    python benchmarks/precision.py --framework=jax
    python benchmarks/precision.py --framework=torch --system meanflow improved --seeds=4 --markdown=precision.md
    python benchmarks/precision.py --framework=torch --system digits --weights=weights.safetensors

Systems are published presets at full size, without dropout.  Modes, all with float32 parameters:
  float32        every product in float32
  tpu            float32 with factors rounded to bfloat16: the default on TPUs, unchanged in the official JAX code
  bfloat16       model.compute_dtype = bfloat16
  mixed          bfloat16 on rows with r = t and in guidance, float32 on rows with r < t: primal, gradient and tangent
  mixed_tangent  bfloat16, but du/dt from a float32 network without gradient: one more forward on rows with r < t
numpy draws weights, batches and random numbers from seeds.  They are exact in float32, so every mode and both
frameworks see the same values.  Random weights have standard deviation 1/sqrt(fan-in), embeddings 1; layers initialised
to zero (gates, adaLN, the last layer of a residual branch) have --scales times that, to mimic how far training moves
them.

Criterion: rounding matters if it is visible next to the variation of the gradient between batches.  For independent
batches i with gradients g_i and errors e_i, the squared norm of the mean gradient is the mean of g_i.g_j over i != j.
That of the bias, which no batch size averages out, is the mean of e_i.e_j.  The remainder of both falls as
1/sqrt(batch size); B is the published batch size.  At random weights, far from any optimum, batches agree; at trained
weights the noise is much larger relative to the mean gradient.
MeanFlow B/2 in batches of 2 takes 10 GB of memory in PyTorch, 15 GB in JAX.
"""

import argparse
import importlib
import json
import math
import statistics
import zlib
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks import precision_report as report
from configs import digits, imf_imagenet, meanflow_cifar10, meanflow_imagenet
from meanflow.config import paths


class Mode(NamedTuple):
    """Matmul data types by role.  rounded: factors of float32 products are rounded to bfloat16."""

    plain: str  # on rows with r = t, and in guidance
    primal: str  # on rows with r < t, for u and its gradient
    tangent: str  # on rows with r < t, for du/dt
    rounded: bool = False


REFERENCE = Mode("float64", "float64", "float64")
MODES = {
    "float32":       Mode("float32", "float32", "float32"),
    "tpu":           Mode("float32", "float32", "float32", rounded=True),
    "bfloat16":      Mode("bfloat16", "bfloat16", "bfloat16"),
    "mixed":         Mode("bfloat16", "float32", "float32"),
    "mixed_tangent": Mode("bfloat16", "bfloat16", "float32"),
}  # fmt: skip
# Preset, name parts of zero-initialised layers, and a tiny size for tests.
TRANSFORMER = {"input_size": 8, "num_classes": 7, "depth": 2, "width": 64, "num_heads": 4}
UNET = {"input_size": 8, "width": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
SYSTEMS = {
    "meanflow": (lambda: meanflow_imagenet.get_config("b2"), ("adaLN_modulation",), TRANSFORMER),
    "cifar10": (meanflow_cifar10.get_config, (".conv1.", ".proj."), UNET),
    "improved": (lambda: imf_imagenet.get_config("b2"), ("attn_scale", "mlp_scale"), TRANSFORMER | {"head_depth": 1}),
    "digits": (digits.get_config, ("adaLN_modulation",), TRANSFORMER),
}
# Smallest plausible error of u in bfloat16 (unit roundoff 2^-9), far above that of float32.
LEAST_ERROR = 2**-12


def make_config(system, size):
    """Return the config of a system.  size: `preset` or `tiny`."""
    preset, _, tiny = SYSTEMS[system]
    config = preset()
    if "dropout" in config.model:
        config.model.dropout = 0.0
    if "attention" in config.model:  # a fused kernel has neither float64 on all devices nor a JVP
        config.model.attention = "plain"
    config.model.update(tiny if size == "tiny" else {})
    return config


def random_weights(shapes, tables, gates, scale, seed=0):
    """Return nonzero canonical weights {name: float32 array}, each drawn from its name and the seed.

    gates: name parts of zero-initialised layers, whose standard deviation is `scale` times that of other layers.
    """
    weights = dict(tables)
    for name, shape in shapes.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        drawn = rng.standard_normal(shape, np.float32)
        gain = scale if any(part in f".{name}" for part in gates) else 1.0
        if "embedding" in name or name.endswith(("_tokens", "_scale")):
            weights[name] = np.float32(gain) * drawn
        elif len(shape) > 1:
            weights[name] = np.float32(gain / math.sqrt(math.prod(shape[1:]))) * drawn
        else:  # scales of norms, and biases
            weights[name] = np.float32(0.1 * gain) * drawn + np.float32(name.endswith("weight"))
    return weights


def random_batch(config, num_rows, seed):
    """Return a batch and draws, arrays by name, exact in float32: unit normals for images and augmentation labels."""
    rng, c = np.random.default_rng([1, seed]), config.model
    shape = (num_rows, c.input_size, c.input_size, c.channels)
    rows = {
        "image": rng.standard_normal(shape, np.float32),
        "label": rng.integers(0, c.num_classes, num_rows),
        "augment": rng.standard_normal((num_rows, c.augment_dim if "augment_dim" in c else 0), np.float32),
    }
    draws = {"noise": rng.standard_normal(shape, np.float32), "times": rng.standard_normal((num_rows, 2), np.float32)}
    uniforms = ("coin", "drop", "dropout", "omega", "t_min", "t_max")
    return rows, draws | {name: rng.random(num_rows, np.float32) for name in uniforms}


def quantities_of(aux):
    """Return the compared {name: array}: u on all rows, du/dt and target on rows with r < t.

    The target of u is v_g - (t - r) du/dt in both methods; improved MeanFlow writes it as the compound velocity.
    """
    jvp = aux["r"] < aux["t"]
    target = aux["v_g"] - (aux["t"] - aux["r"])[:, None, None, None] * aux["du_dt"]
    return {"u": aux["u"], "du_dt": aux["du_dt"][jvp], "target": target[jvp]}


class Sum:
    """Accumulates independent vectors, each a dict of arrays by name."""

    def __init__(self):
        self.total, self.squares = {}, []

    def add(self, vector):
        """Add a vector."""
        for name, a in vector.items():
            if name in self.total:
                self.total[name] += a.astype(np.float32)
            else:
                self.total[name] = a.astype(np.float32)
        self.squares.append(sum(square(a) for a in vector.values()))

    def of_mean(self):
        """Return the squared norm of the expected vector: the mean of a.b over pairs; it may be negative."""
        num = len(self.squares)
        return (sum(map(square, self.total.values())) - sum(self.squares)) / (num * (num - 1))

    def of_rest(self):
        """Return the expected squared norm of a vector's deviation from the expected vector."""
        return statistics.fmean(self.squares) - self.of_mean()


def square(a):
    """Return the sum of squares, in float64."""
    a = a.astype(np.float64).ravel()
    return float(a @ a)


def relative_error(got, want):
    """Return ||got - want|| / ||want||, in float64."""
    return math.sqrt(square(got.astype(np.float64) - want) / square(want))


def compare(got, want):
    """Return the errors {name: array} of one gradient {name: array}, and figures by name.

    along: projection of the error on the gradient, relative to the gradient; negative if the gradient shrinks.
    """
    errors, squares, norms, along = {}, {}, {}, 0.0
    for name, a in want.items():
        error = (got[name] - a).ravel()
        squares[name], norms[name] = float(error @ error), float(np.vdot(a, a))
        along += float(error @ a.ravel())
        errors[name] = error.astype(np.float32)
    norm, off = sum(norms.values()), sum(squares.values())
    along, each = along / norm, {name: math.sqrt(squares[name] / norms[name]) for name in want if norms[name]}
    worst = max(each, key=lambda name: each[name])
    one_minus_cosine = 1 - (1 + along) / math.sqrt(1 + 2 * along + off / norm)
    return errors, {
        "gradient": math.sqrt(off / norm), "one_minus_cosine": one_minus_cosine, "along": along, "worst": each[worst],
        "worst_name": worst,
    }  # fmt: skip


def study(framework, config, gates, args, weights=None):
    """Return {scale: {root mean squares, sampling noise, modes: {mode: figures}}}, medians over seeds.

    framework: the module of a framework.  weights: canonical weights instead of random ones.
    """
    shapes, tables = framework.shapes(config)
    reference, table = framework.make(config, REFERENCE), {}
    runs = {name: framework.make(config, MODES[name]) for name in args.modes}
    bar = tqdm(total=len(args.scales) * args.seeds * len(runs), unit="run", disable=None)
    for scale in args.scales:
        canonical = weights or random_weights(shapes, tables, gates, scale)
        whole, sums = Sum(), {name: Sum() for name in runs}
        figures, sizes = {name: [] for name in runs}, []
        for seed in range(args.seeds):
            batch = random_batch(config, args.batch, seed)
            aux, grads = reference(canonical, *batch)
            values = quantities_of(aux)
            sizes.append({name: math.sqrt(square(a) / a.size) for name, a in values.items()})
            whole.add(grads)
            for name, run in runs.items():
                aux, got = run(canonical, *batch)
                errors, row = compare(got, grads)
                sums[name].add(errors)
                got = quantities_of(aux)
                figures[name].append(row | {key: relative_error(got[key], a) for key, a in values.items()})
                bar.update()
        share = args.batch / config.train.batch_size  # fraction of a step's rows
        noise = at_batch(whole, whole, share)["error"]
        modes = {name: medians(figures[name]) | at_batch(sums[name], whole, share) for name in runs}
        check(modes)
        modes = {name: row | {"over_noise": row["error"] / noise} for name, row in modes.items()}
        table[str(scale)] = {"sizes": medians(sizes), "noise": noise, "modes": modes}
    return table


def check(modes):
    """Raise RuntimeError if a mode's error of u is too small for its data types."""
    for name, figures in modes.items():
        if MODES[name] != MODES["float32"] and not figures["u"] > LEAST_ERROR:
            raise RuntimeError(
                f"mode {name} has an error of {figures['u']:.1e} in u, like float32: its products were not rounded, or "
                "the batch has no row on which they are (mixed rounds only flow rows; give it more with --batch)"
            )


def at_batch(errors, gradients, share):
    """Return the bias of a gradient and its error at the published batch size, relative to the mean gradient.

    share: measured / published batch size.  Returns nan if there are too few seeds to estimate the mean gradient.
    """
    norm, bias = max(gradients.of_mean(), 0.0) or math.nan, max(errors.of_mean(), 0.0)
    rest = errors.of_rest() * share
    return {"bias": math.sqrt(bias / norm), "error": math.sqrt((rest if errors is gradients else bias + rest) / norm)}


def medians(rows):
    """Return the median of each figure, or the most frequent value for names."""
    values = {key: [row[key] for row in rows] for key in rows[0]}
    return {key: statistics.mode(v) if isinstance(v[0], str) else statistics.median(v) for key, v in values.items()}


def main():
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("jax", "torch"), required=True)
    parser.add_argument("--system", nargs="+", choices=tuple(SYSTEMS), default=["meanflow", "cifar10", "improved"])
    parser.add_argument("--size", choices=("preset", "tiny"), default="preset")
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=list(MODES))
    parser.add_argument(
        "--scales", type=float, nargs="+", default=[0.3, 1.0], help="relative deviations of zero-initialised layers"
    )
    parser.add_argument(
        "--weights", type=paths.expand, help="canonical .safetensors of one system, instead of random weights"
    )
    parser.add_argument("--batch", type=int, default=4, help="batch size")
    parser.add_argument("--seeds", type=int, default=3, help="number of batches, at least 2")
    parser.add_argument("--json", type=paths.written, help="also write all figures here")
    parser.add_argument("--markdown", type=paths.written, help="also write the tables here")
    parser.add_argument("--plot", type=paths.written, help="also plot them here")
    args = parser.parse_args()
    if args.seeds < 2 or (args.weights and len(args.system) > 1):
        parser.error("--seeds must be at least 2, and --weights needs exactly one --system")
    framework = importlib.import_module(f"benchmarks.precision_{args.framework}")
    weights, results = framework.weights.load(args.weights) if args.weights else None, {}
    args.scales = args.scales[:1] if weights else args.scales
    for system in args.system:
        config = make_config(system, args.size)
        results[system] = config, study(framework, config, SYSTEMS[system][1], args, weights)
        print(report.markdown(args.framework, {system: results[system]}, args), flush=True)
    if args.json:
        figures = {system: table for system, (_, table) in results.items()}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    if args.markdown:
        args.markdown.write_text(report.markdown(args.framework, results, args) + "\n")
    if args.plot:
        report.plot(args.plot, args.framework, results, args)


if __name__ == "__main__":
    main()
