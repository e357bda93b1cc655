"""Takes one compiled training step of a config's full network in both frameworks and compares the results.

    python parity/full_step.py --config=configs/meanflow_cifar10.py:v1 [--batch_size 8] [--backend aot_eager]

Both use the same random non-zero weights, batch and draws, in float32 whatever the config says, and the trainers' own
step functions.  Prints the number of parameters, the logged scalars, and the difference of the gradient norms per
tensor.
Exit code 0 if all agree to 1e-4, 1 if not, 2 for a usage error.
"""

import argparse
import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from jax_impl import devices as jax_devices
from jax_impl import step as jax_step
from jax_impl import weights as jax_weights
from jax_impl.methods import METHODS as JAX_METHODS
from meanflow.errors import UserError, exit_on_user_error
from parity.adapters.frameworks import FRAMEWORKS
from parity.checks import Measure, relative_error
from parity.convert import load_config
from torch_impl import devices as torch_devices
from torch_impl import step as torch_step
from torch_impl import weights as torch_weights
from torch_impl.methods import METHODS as TORCH_METHODS

BOUND = 1e-4
FLOOR = 1e-3  # fraction of the full gradient's norm: the least norm that differences are measured against


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code.  Raises UserError for usage errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="config of the run: FILE.py[:variant]")
    parser.add_argument("--batch_size", type=int, default=8, help="rows of the batch (default: 8)")
    parser.add_argument(
        "--backend", choices=("inductor", "aot_eager", "eager"),
        help="torch.compile backend; eager: not compiled (default: from the config)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch_size is {args.batch_size}; it must be at least 1")
    config = load_config(args.config)
    if "guidance_type" in config.method and config.method.guidance_type == "distill":
        raise UserError("one step is compared without a teacher: config.method.guidance_type must be mg or default")
    config.train.update(batch_size=args.batch_size, accumulate=1, fsdp=1, matmul_precision="highest")
    config.model.compute_dtype = "float32"
    config.train.compile = args.backend != "eager"
    if args.backend in ("inductor", "aot_eager"):
        config.train.compile_backend = args.backend
    return 0 if compare(config) else 1


def compare(config) -> bool:
    """Take the step in both frameworks, print the results, and return whether they agree."""
    jax_devices.set_precision(config)
    torch_devices.set_precision(config)
    canonical = random_weights(config)
    tables = FRAMEWORKS["torch"].tables(FRAMEWORKS["torch"].build(config, canonical))
    num_parameters = sum(a.size for name, a in canonical.items() if name not in tables)
    print(f"{config.model.name}: {num_parameters / 1e6:.2f} million parameters", flush=True)
    batch, draws = random_rows(config)
    results = {}
    for name, take in (("jax", jax_result), ("torch", torch_result)):
        results[name], seconds = take(config, canonical, batch, draws)
        print(f"{name}: {seconds[0]:.0f} s with compilation, then {seconds[1]:.2f} s a step", flush=True)
    (metrics, grads), (torch_metrics, torch_grads) = results["jax"], results["torch"]
    measure = Measure("full_step")
    for key in metrics:
        measure.compare("jax-torch", key, metrics[key], torch_metrics[key], BOUND)
        print(f"{key:22} {metrics[key]:14.8g} {torch_metrics[key]:14.8g}  {measure.checks[-1].error:.1e}")
    floor = FLOOR * float(torch_metrics["grad_norm"])
    norms = {name: (np.linalg.norm(grads[name]), np.linalg.norm(g)) for name, g in torch_grads.items()}
    apart = {name: abs(a - b) / max(b, floor) for name, (a, b) in norms.items()}
    worst = max(apart, key=lambda name: apart[name])
    measure.add("jax-torch", "gradient norms", float(apart[worst]), BOUND)
    whole = relative_error(*(np.concatenate([g[name].ravel() for name in norms]) for g in (grads, torch_grads)))
    print(
        f"norms of {len(norms)} gradients, worst {worst}: {apart[worst]:.1e}; all gradients as one vector: {whole:.1e}"
    )
    ok = all(check.ok for check in measure.checks)
    print("agree" if ok else f"DISAGREE by more than {BOUND}")
    return ok


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


def random_rows(config) -> tuple[dict, dict]:
    """Return a batch and its draws, by name."""
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
    draw = functools.partial(JAX_METHODS[config.method.name].draw, shape=shape, cfg=config.method)
    shapes = jax.eval_shape(lambda: draw(jax.random.key(0)))._asdict()
    normals = ("noise",) if config.method.time_sampler == "uniform" else ("noise", "times")
    if config.method.name == "rectified":
        normals, batch["noise"] = ("interval",), rng.normal(size=shape).astype(np.float32)
    draws = {
        name: (rng.normal if name.startswith(normals) else rng.uniform)(size=a.shape) for name, a in shapes.items()
    }
    return batch, {name: a.astype(np.float32) for name, a in draws.items()}


def jax_result(config, canonical, batch, draws):
    """Return (metrics, gradients by canonical name) of the JAX step, and the seconds of two steps."""
    mesh = jax_step.make_mesh(config)
    graphdef, fresh = jax_step.build_net(config)
    net = nnx.merge(graphdef, fresh)
    draws = JAX_METHODS[config.method.name].Draws(**{name: jnp.asarray(a) for name, a in draws.items()})
    train_step = jax_step.make_train_step(config, graphdef, mesh, draw=lambda *_: draws)
    seconds = []
    for _ in range(2):  # of the same state
        _, state = jax_step.create_state(config, mesh, jax_weights.from_canonical(net, canonical))
        began = time.perf_counter()
        state, metrics = jax.block_until_ready(train_step(state, jax_step.put_batch(batch, mesh)))
        seconds.append(time.perf_counter() - began)
    [moments] = [s.mu for s in state.opt_state if hasattr(s, "mu")]  # after one step: (1 - beta1) times the gradient
    grads = {name: a / (1 - config.train.beta1) for name, a in jax_weights.to_canonical(net, moments).items()}
    return (jax.tree.map(np.asarray, metrics), grads), seconds


def torch_result(config, canonical, batch, draws):
    """Return the same of the PyTorch step."""
    device = torch.device("cpu")
    given = {name: torch.from_numpy(a) for name, a in draws.items()}
    given = {name: a.permute(0, 3, 1, 2).contiguous() if a.ndim == 4 else a for name, a in given.items()}
    given = TORCH_METHODS[config.method.name].Draws(**given)
    train_step = torch_step.make_train_step(config, draw=lambda *_: given)
    params = torch_weights.from_canonical(torch_step.build_net(config), canonical)
    state = torch_step.create_state(config, None, device, params)
    results, seconds = [], []
    for _ in range(2):
        began = time.perf_counter()
        state, metrics = train_step(state, torch_step.put_batch(batch, device))
        seconds.append(time.perf_counter() - began)
        moments = {name: state.optimizer.state[p]["exp_avg"].clone() for name, p in state.net.named_parameters()}
        grads = {name: a.numpy() / (1 - config.train.beta1) for name, a in moments.items()}
        results.append((jax.tree.map(np.asarray, torch_step.reduce_metrics([metrics])[0]), grads))
    return results[0], seconds


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
