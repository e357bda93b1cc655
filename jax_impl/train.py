"""Training in JAX: what a run starts from, and what the shared loop (`meanflow.commands.train`) asks of a framework."""

import functools
import socket

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jax_impl import weights
from jax_impl.checkpoints import Checkpoints, read_weights
from jax_impl.devices import first_does, gather
from jax_impl.flops import count_forward
from jax_impl.models.attention import check_kernels
from jax_impl.sample import NETWORKS, make_sampler
from jax_impl.step import (
    BATCH,
    abstract_state,
    build_net,
    create_state,
    make_mesh,
    make_train_step,
    put_batch,
    state_shardings,
)
from meanflow.commands import startup
from meanflow.commands import train as training
from meanflow.commands.logs import MetricLog
from meanflow.commands.train import Termination
from meanflow.config import checks
from meanflow.config.workdir import check_workdir, open_workdir
from meanflow.console_log import show_only_warnings
from meanflow.data import draws
from meanflow.data.examples import with_latents
from meanflow.data.loader import make_loader
from meanflow.data.prefetch import Prefetcher
from meanflow.process_group import ProcessGroup


def train(config, workdir):
    """Train from config, or resume what is in the work directory, to `config.train.steps`.  Returns the last state.

    SIGTERM or SIGUSR1, inside `signals.caught`, saves a checkpoint and returns.  Raises UserError for anything the user
    can fix, including a non-finite loss; the latest checkpoint then predates it.
    """
    checks.check_trainable(config)
    check_kernels(config.model)
    first = jax.process_index() == 0
    if not first:
        show_only_warnings()
    config = with_latents(config)
    # First, because another run in this directory may have taken all the memory of the device.
    check_workdir(workdir, config, "jax", alone=not jax.distributed.is_initialized())
    checks.check_divisible(config, jax.device_count(), "devices")
    mesh = make_mesh(config)
    process = jax.process_index(), jax.process_count()
    loader = make_loader(config, config.train.batch_size, *process)
    draw = functools.partial(draws.of_process, config, process=process)
    loader = Prefetcher(loader, functools.partial(put_batch, mesh=mesh), config.data.prefetch, draw)
    teacher = load_teacher(config, mesh)
    checkpoints = Checkpoints(workdir, config)
    graphdef, state, progress = start_state(config, mesh, checkpoints)
    reports = make_reports(config, graphdef, mesh, workdir)
    # Only now that everything the config names has been found: a mistake leaves no directory behind.
    digests = training.read_contents(config, read_weights)
    lock = first_does(lambda: open_workdir(workdir, config, "jax", digests))
    checkpoints.open()
    log, step = MetricLog(workdir, active=first), int(state.step)
    run = training.Run(config, loader, checkpoints, log, training.Window(fetch), reports, lock)
    run.resume(step, progress)
    run.per_step = report_setup(config, state)
    train_step, termination = make_train_step(config, graphdef, mesh, teacher=teacher), Termination(make_post(mesh))
    with training.closing(run, alone=jax.process_count() == 1):
        return training.loop(run, train_step, state, step, termination, peak_memory)


def start_state(config, mesh, checkpoints=None):
    """Return the graph definition, the state to train from and its progress (see `Checkpoints.save`).

    They come from the newest checkpoint.  Without one, the state is that of step 0, with the weights in the directory,
    or those of `train.load_from`, if there are any, and the progress is None.  A run with a checkpoint never reads that
    model, which may be gone.  Raises UserError if it is needed and differs from this one in channels, heads or path.
    """
    graphdef, like = abstract_state(config, mesh)  # shapes only, so that no device ever holds two states
    restored = checkpoints.restore(like) if checkpoints else None
    if restored:
        return graphdef, *restored
    model, load_classes = training.start_of(config, checkpoints)
    if not model:
        return *create_state(config, mesh), None
    graphdef, fresh = build_net(config)
    net = nnx.merge(graphdef, fresh)
    own, canonical = training.read_model(model, config, read_weights)
    checks.check_alike(config, own, "train.load_from")
    canonical = weights.transfer(net, fresh, canonical, resize=True, load_classes=load_classes)
    return *create_state(config, mesh, weights.from_canonical(net, canonical)), None


def load_teacher(config, mesh):
    """Return (graph definition, parameters) of the frozen flow model of guidance distillation, None without one.

    Raises UserError if `method.teacher` is not a flow model, or has other images or classes.
    """
    if not training.has_teacher(config):
        return None
    own, canonical = training.read_model(config.method.teacher, config, read_weights)
    graphdef, params = build_net(checks.check_teacher(config, own))
    net = nnx.merge(graphdef, params)
    params = weights.from_canonical(net, weights.transfer(net, params, canonical))
    return graphdef, jax.device_put(params, state_shardings(params, mesh))


def report_setup(config, state):
    """Report the set-up of a run, see `startup.report`, and return its result; {} except in the first process.

    Call in all processes.
    """
    hosts = [host.decode() for host in gather(socket.gethostname().encode())]
    if not hosts:
        return {}

    def size(tree):  # bytes on one device
        return sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(tree))

    sizes = {"parameters": size(state.params), "optimizer": size(state.opt_state), "EMA": size(state.emas)}
    sizes["gradients"] = sizes["parameters"]
    num_parameters = sum(a.size for a in jax.tree.leaves(state.params))
    device = jax.devices()[0].device_kind
    setup = startup.Setup(hosts, jax.device_count(), device, num_parameters, sizes, count_forward(config))
    return startup.report(config, setup, int(state.step))


def fetch(metrics):
    """Return the metrics of each step, [{name: scalar}], as floats."""
    return [{name: float(value) for name, value in scalars.items()} for scalars in jax.device_get(metrics)]


def peak_memory(metrics):
    """Return the peak bytes used on a device once the step of these metrics is done; None on a CPU."""
    jax.block_until_ready(metrics)
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def make_post(mesh):
    """Return how processes agree to stop, see `Termination`; None for a single process.  Call in all processes."""
    if jax.process_count() == 1:
        return None
    any_asked = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def post(asked):
        local = np.full(jax.local_device_count(), asked, np.int32)
        posted = any_asked(jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), local))
        return lambda: bool(posted.addressable_data(0))

    return post


def make_reports(config, graphdef, mesh, workdir):
    """Return the reports of a run, [(every, report)]: image grids, evaluations and snapshots.

    Raises UserError for what evaluations need and cannot be read.
    """
    group = ProcessGroup(jax.process_index(), jax.process_count(), gather, together=True)

    def weights_of(state, ema):
        return state.params if ema < 0 else state.emas[ema]

    def canonical_emas(state):
        return (weights.to_canonical(nnx.merge(graphdef, ema), ema) for ema in state.emas)

    return [
        *training.make_reports(config, make_sampler(config, graphdef, mesh), NETWORKS, group, weights_of),
        training.make_snapshots(config, workdir, canonical_emas, active=group.process == 0),
    ]
