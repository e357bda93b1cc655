"""Takes one compiled training step of a config's full network in both frameworks and compares the results.

    python parity/full_step.py --config=configs/meanflow_cifar10.py:v1 [--batch_size 8] [--backend aot_eager] [--gpu]

All use the same random non-zero weights, batch and draws, in float32 whatever the config says, and the trainers' own
step functions, on the CPU; with --gpu, on the GPU too, and PyTorch's step on the CPU is not compiled, which would take
minutes.  Then each draws samples with these weights.  Prints the number of parameters, and for each run its logged
scalars, gradients and samples against those of JAX on the CPU.
Exit code 0 if all agree to 1e-4, 1 if not, 2 for a usage error.
"""

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import torch
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jax_impl import devices as jax_devices
from jax_impl import sample as jax_sample
from jax_impl import step as jax_step
from jax_impl import weights as jax_weights
from meanflow.data import draws
from meanflow.errors import UserError, exit_on_user_error
from parity.adapters import frameworks
from parity.adapters.frameworks import FRAMEWORKS
from parity.checks import Measure
from parity.convert import load_config
from torch_impl import devices as torch_devices
from torch_impl import sample as torch_sample
from torch_impl import step as torch_step
from torch_impl import weights as torch_weights

BOUND = 1e-4
FLOOR = 1e-3  # fraction of the full gradient's norm: the least norm that differences are measured against
PLATFORMS = {"cpu": "cpu", "gpu": "cuda"}  # JAX's name: PyTorch's


class Outcome(NamedTuple):
    """What one framework makes of the inputs on one device."""

    metrics: dict[str, np.ndarray]  # of the step, as logged
    grads: dict[str, np.ndarray]  # by canonical name
    samples: np.ndarray  # [b h w c]
    seconds: list[float]  # of two steps, the first with compilation


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code.  Raises UserError for usage errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="config of the run: FILE.py[:variant]")
    parser.add_argument("--batch_size", type=int, default=8, help="rows of the batch (default: 8)")
    parser.add_argument(
        "--backend", choices=("inductor", "aot_eager", "eager"),
        help="torch.compile backend; eager: not compiled (default: from the config)",
    )  # fmt: skip
    parser.add_argument("--gpu", action="store_true", help="compare steps on the GPU, too")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch_size is {args.batch_size}; it must be at least 1")
    if args.gpu:
        frameworks.check_gpu()
    config = load_config(args.config)
    if "guidance_type" in config.method and config.method.guidance_type == "distill":
        raise UserError("one step is compared without a teacher: config.method.guidance_type must be mg or default")
    config.train.update(batch_size=args.batch_size, accumulate=1, fsdp=1, matmul_precision="highest")
    config.model.compute_dtype = "float32"
    config.sample.steps = min(config.sample.steps, 4)
    if "sampler" in config.sample and config.sample.sampler in ("sde", "ctm"):  # which draw noise
        config.sample.sampler = "euler"
    config.train.compile = args.backend != "eager"
    if args.backend in ("inductor", "aot_eager"):
        config.train.compile_backend = args.backend
    return 0 if compare(config, ("cpu", "gpu") if args.gpu else ("cpu",)) else 1


def compare(config, platforms: Sequence[str] = ("cpu",)) -> bool:
    """Take the step in both frameworks on each platform, print the results, and return whether they agree."""
    jax_devices.set_precision(config)
    torch_devices.set_precision(config)
    canonical = random_weights(config)
    tables = FRAMEWORKS["torch"].tables(FRAMEWORKS["torch"].build(config, canonical))
    num_parameters = sum(a.size for name, a in canonical.items() if name not in tables)
    print(f"{config.model.name}: {num_parameters / 1e6:.2f} million parameters", flush=True)
    batch = random_rows(config)
    results = {}
    for platform, (framework, take) in itertools.product(platforms, (("jax", jax_result), ("torch", torch_result))):
        name = f"{framework}, {platform}"
        chosen = copy.deepcopy(config)
        chosen.train.compile &= platform == platforms[-1]
        found = take(chosen, canonical, batch, platform)
        results[name] = found._replace(grads={key: g for key, g in found.grads.items() if key not in tables})
        first, second = found.seconds
        print(f"{name}: {first:.0f} s with compilation, then {second:.2f} s a step", flush=True)
    (reference, expected), *others = results.items()
    measure = Measure("full_step")
    for name, found in others:
        print(f"\n{'':22} {reference:>14} {name:>14}  error")
        compare_two(measure, expected, found)
    ok = all(check.ok for check in measure.checks)
    print("agree" if ok else f"DISAGREE by more than {BOUND}")
    return ok


def compare_two(measure: Measure, expected: Outcome, found: Outcome) -> None:
    """Measure and print how far an outcome is from the expected one."""
    for key, value in expected.metrics.items():
        measure.compare("jax-torch", key, value, found.metrics[key], BOUND)
        print(f"{key:22} {value:14.8g} {found.metrics[key]:14.8g}  {measure.checks[-1].error:.1e}")
    floor = FLOOR * float(expected.metrics["grad_norm"])
    norms = {name: (np.linalg.norm(found.grads[name]), np.linalg.norm(g)) for name, g in expected.grads.items()}
    apart = {name: abs(a - b) / max(b, floor) for name, (a, b) in norms.items()}
    worst = max(apart, key=lambda name: apart[name])
    measure.add("jax-torch", "gradient norms", float(apart[worst]), BOUND)
    print(f"norms of {len(norms)} gradients, worst {worst}: {apart[worst]:.1e}")
    whole = [np.concatenate([grads[name].ravel() for name in norms]) for grads in (found.grads, expected.grads)]
    pairs = {"all gradients as one vector": whole, "samples": (found.samples, expected.samples)}
    for name, (got, want) in pairs.items():
        measure.compare("jax-torch", name, got, want, BOUND)
        print(f"{name}: {measure.checks[-1].error:.1e}")


def random_weights(config) -> dict[str, np.ndarray]:
    """Return canonical weights that are non-zero everywhere and keep activations of order 1, as in training."""
    torch_framework, rng = FRAMEWORKS["torch"], np.random.RandomState(0)
    weights = torch_framework.fresh_weights(config, [0])[0]
    kept = {
        "freqs",
        "phases",
        *(name.rpartition(".")[2] for name in torch_framework.tables(torch_framework.build(config, weights))),
    }
    for name, a in weights.items():
        if name.rpartition(".")[2] in kept:
            continue
        if a.ndim > 1:
            weights[name] = rng.normal(0, a[0].size ** -0.5, a.shape).astype(np.float32)
        else:
            weights[name] = (a + rng.normal(0, 0.1, a.shape)).astype(np.float32)
    return weights


def random_rows(config) -> dict:
    """Return a batch with its draws, by name."""
    c, num, rng = config.model, config.train.batch_size, np.random.RandomState(1)
    shape = (num, c.input_size, c.input_size, c.channels)
    batch = {
        "image": rng.uniform(-1, 1, shape).astype(np.float32),
        "label": rng.randint(0, c.num_classes, num).astype(np.int32),
    }
    if "augment_dim" in c and c.augment_dim:
        batch["augment"] = rng.normal(size=(num, c.augment_dim)).astype(np.float32)
    if "repa_dims" in c and c.repa_dims:
        tokens = (c.input_size // c.patch_size) ** 2
        batch["features"] = rng.normal(size=(num, tokens, sum(c.repa_dims))).astype(np.float32)
    if config.method.name == "rectified":
        batch["noise"] = rng.normal(size=shape).astype(np.float32)
    return batch | draws.of_process(config, step=0)


def jax_result(config, canonical, batch, platform="cpu") -> Outcome:
    """Return the outcome of JAX on a platform, `cpu` or `gpu`."""
    [device, *_] = jax.devices(platform)
    mesh = jax_devices.local_mesh([device])
    with jax.default_device(device):
        graphdef, fresh = jax_step.build_net(config)
        net = nnx.merge(graphdef, fresh)
        train_step = jax_step.make_train_step(config, graphdef, mesh)
        seconds = []
        for _ in range(2):  # of the same state
            params = jax_weights.from_canonical(net, canonical)
            _, state = jax_step.create_state(config, mesh, params)
            began = time.perf_counter()
            state, metrics = jax.block_until_ready(train_step(state, jax_step.put_batch(batch, mesh)))
            seconds.append(time.perf_counter() - began)
        [moments] = [
            s.mu for s in state.opt_state if hasattr(s, "mu")
        ]  # after one step: (1 - beta1) times the gradient
        grads = {name: a / (1 - config.train.beta1) for name, a in jax_weights.to_canonical(net, moments).items()}
        sampler = jax_sample.make_sampler(config, graphdef, mesh)
        params = jax.device_put(jax_weights.from_canonical(net, canonical), NamedSharding(mesh, PartitionSpec()))
        samples = sampler(params, *starts(batch), config.sample)
    return Outcome(jax.tree.map(np.asarray, metrics), grads, np.asarray(samples), seconds)


def torch_result(config, canonical, batch, platform="cpu") -> Outcome:
    """Return that of PyTorch."""
    device = torch.device(PLATFORMS[platform])
    train_step = torch_step.make_train_step(config)
    params = torch_weights.from_canonical(torch_step.build_net(config), canonical)
    state = torch_step.create_state(config, None, device, params)
    results, seconds = [], []
    for _ in range(2):
        began = time.perf_counter()
        state, metrics = train_step(state, torch_step.put_batch(batch, device))
        moments = {name: state.optimizer.state[p]["exp_avg"].cpu().clone() for name, p in state.net.named_parameters()}
        seconds.append(time.perf_counter() - began)
        grads = {name: a.numpy() / (1 - config.train.beta1) for name, a in moments.items()}
        results.append((jax.tree.map(np.asarray, torch_step.reduce_metrics([metrics])[0]), grads))
    samples = torch_sample.make_sampler(config, device)(canonical, *starts(batch), config.sample)
    (metrics, grads), _ = results
    return Outcome(metrics, grads, samples, seconds)


def starts(batch) -> tuple[np.ndarray, np.ndarray]:
    """Return the noise [b h w c] and labels [b] of the samples."""
    return np.random.RandomState(2).normal(size=batch["image"].shape).astype(np.float32), batch["label"]


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
