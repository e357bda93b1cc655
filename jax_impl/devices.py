"""Devices and processes, from the flags and the cluster's environment."""

import contextlib
import contextvars
import functools
import os
import socket
from collections import Counter
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from jax._src import distributed  # JAX has no public way to its store of keys and values
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from meanflow.commands import cluster
from meanflow.commands.processes import Board
from meanflow.errors import UserError

AXES = ("data", "fsdp")
_TEXT = 2**12  # bytes of an error message between processes
PIECE = 2**26  # bytes per process that `gather` moves at a time

flags.disclaim_key_flags()  # --help lists the flags under the command that defines them


def define_flags():
    """Define the flags of commands that run in several processes."""
    flags.DEFINE_bool("distributed", False, "Join the processes that the cluster's scheduler started.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for processes started by hand.")
    flags.DEFINE_integer("num_processes", 1, "Number of processes, with --coordinator.", lower_bound=1)
    flags.DEFINE_integer("process", 0, "Index of this process, with --coordinator.", lower_bound=0)
    flags.DEFINE_integer("cpu_devices", 0, "Split the CPU into this many devices, to try out sharding.", lower_bound=0)


def set_precision(config):
    """Set the precision of this process; call it before any array is created.

    train.matmul_precision applies to float32 matmuls and convolutions; a float64 model enables float64.
    """
    jax.config.update("jax_default_matmul_precision", config.train.matmul_precision)
    jax.config.update("jax_enable_x64", config.model.compute_dtype == "float64")


def with_float64(function):
    """Return the function, run with float64 enabled, so that arrays keep their dtype whatever the process's precision.

    Otherwise JAX silently reads and writes float64 weights as float32.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        with jax.enable_x64(True):
            return function(*args, **kwargs)

    return run


def start_jax(config):
    """Set precision and devices, and join the other processes if there are any.

    Raises UserError if they cannot be joined.
    """
    f = flags.FLAGS
    visible = cluster.visible_gpus(os.environ)
    if f.distributed or f.coordinator:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        arguments = _arguments(visible)
        try:
            jax.distributed.initialize(**arguments)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"cannot join the other processes: {str(error).splitlines()[0]}") from error
    else:
        cluster.check_started_together(os.environ, 1, "add --distributed, or start one (srun --ntasks=1)")
    _set_up(config, visible)


def _arguments(visible) -> dict[str, Any]:
    f = flags.FLAGS
    if not f.coordinator:
        return {"local_device_ids": cluster.gpus_of_task(os.environ, visible)}
    where = {"coordinator_address": f.coordinator, "num_processes": f.num_processes, "process_id": f.process}
    return where | {"cluster_detection_method": "deactivate"}  # else SLURM's would take one GPU, whatever the flags say


def _set_up(config, visible):
    """Set precision and devices, and log this process's devices."""
    set_precision(config)
    if flags.FLAGS.cpu_devices:
        jax.config.update("jax_num_cpu_devices", flags.FLAGS.cpu_devices)
    local = jax.local_devices()
    there = cluster.gpus_of_node(os.environ, visible) if local[0].platform == "gpu" else len(local)
    logging.info(
        "process %d of %d on %s: %d of its %d devices (%s)", jax.process_index(), jax.process_count(),
        socket.gethostname(), len(local), there, local[0].device_kind,
    )  # fmt: skip


def start_alone(config):
    """Return the index of this process and the number of processes; from here on each works alone."""
    f = flags.FLAGS
    if f.coordinator:  # the flags say everything
        _set_up(config, cluster.visible_gpus(os.environ))
        return f.process, f.num_processes
    start_jax(config)
    group = jax.process_index(), jax.process_count()
    jax.distributed.shutdown()  # else a process that ends early would wait for the others, and a crash would end them
    return group


def local_mesh(devices=None):
    """Return the mesh (data, fsdp) of some or all devices of this process, with fsdp 1."""
    return device_mesh(devices or jax.local_devices(), 1)


def device_mesh(devices, fsdp):
    """Return the mesh (data, fsdp) of the devices.  Raises UserError as `order_devices` does."""
    return Mesh(order_devices(devices, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


def order_devices(devices, fsdp):
    """Return the devices as an array [data fsdp]; each row of `fsdp` neighbours shares one copy of the state.

    Devices are ordered by process, so process p of n owns the p-th of n equal, contiguous parts of a batch.
    (`jax.make_mesh` refuses several GPU hosts.)  A single TPU slice keeps JAX's order, which follows the topology.
    Raises UserError if processes have different numbers of devices, or as `check_groups` does.
    """
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    sizes = Counter(device.process_index for device in devices)
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"process {process} has {size}" for process, size in sizes.items())
        raise UserError(f"every process needs the same number of devices, but {shown}")
    # On GPUs a slice is a host, connected by NVLink.  CPUs have no slices.
    slices = [getattr(device, "slice_index", None) for device in devices]
    hosts = [device.process_index for device in devices] if None in slices else slices
    cluster.check_groups(hosts, fsdp, "devices")
    shape = len(devices) // fsdp, fsdp
    if devices[0].platform == "tpu" and len(set(hosts)) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.array(devices).reshape(shape)


@contextlib.contextmanager
def compiled_for(mesh):
    """Trace for the devices of a mesh, which need not be of the default platform, nor be there."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


def platform():
    """Return the platform of the devices that the program being traced is for, such as `gpu`."""
    mesh = _mesh.get()
    return mesh.devices.flat[0].platform if mesh else jax.default_backend()


def shard(a, mesh):
    """Return the sharding of an array of the state: along its longest axis that fsdp divides, if there is one."""
    fsdp = mesh.shape["fsdp"]
    spec: list[str | None] = [None] * a.ndim
    axes = [axis for axis in range(a.ndim) if a.shape[axis] % fsdp == 0]
    if fsdp > 1 and axes:
        spec[max(axes, key=lambda axis: a.shape[axis])] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*spec))


def sharded():
    """Return whether the program being traced is for devices that each have a part of the parameters."""
    mesh = _mesh.get()
    return mesh is not None and mesh.shape["fsdp"] > 1


def in_parts(arrays):
    """Return parameters in the parts that devices have of them; otherwise XLA would gather them earlier than needed."""
    if not sharded():
        return arrays
    mesh = _mesh.get()
    return jax.lax.with_sharding_constraint(arrays, jax.tree.map(lambda a: shard(a, mesh), arrays))


def gathered(arrays):
    """Return whole parameters for the devices that each have a part of them; their gradients are in such parts again.

    Without `compiled_for`, or where fsdp is 1, parameters are whole already.
    """
    return jax.tree.map(functools.partial(_gather, _mesh.get()), arrays) if sharded() else arrays


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(mesh, a):
    return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, PartitionSpec()))


def _scatter(mesh, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, shard(gradient, mesh)),)


_gather.defvjp(lambda mesh, a: (_gather(mesh, a), None), _scatter)


def first_does(act):
    """Call `act` only in the first process and wait for it in all.  Returns its result there, None elsewhere.

    Raises its UserError in every process, so that none waits for one that has ended.
    """
    result, text = None, b""
    if jax.process_index() == 0:
        try:
            result = act()
        except UserError as error:
            text = str(error).encode()[:_TEXT]
    if jax.process_count() > 1:
        padded = np.frombuffer(text.ljust(_TEXT, b"\0"), np.uint8)
        text = multihost_utils.broadcast_one_to_all(padded).tobytes().rstrip(b"\0")
    if text:
        raise UserError(text.decode(errors="replace"))
    return result


def make_board():
    """Return the board that the processes share, kept by the coordinator; None for a single process."""
    if jax.process_count() == 1:
        return None
    client: Any = distributed.global_state.client
    process = jax.process_index()

    def read():
        return "".join(note for _, note in client.key_value_dir_get("failed/")[:1])

    def all_end():
        return len(client.key_value_dir_get("ends/")) == jax.process_count()

    return Board(
        process, lambda note: client.key_value_set(f"failed/{process}", note), read,
        lambda: client.key_value_set(f"ends/{process}", "yes", allow_overwrite=True), all_end, process == 0,
    )  # fmt: skip


def wait_for_all():
    """Wait until all processes get here."""
    multihost_utils.sync_global_devices("end")


def gather(part):
    """Return the bytes of every process, in process order, in the first process; an empty list elsewhere."""
    if jax.process_count() == 1:
        return [part]
    size = divmod(len(part), PIECE)  # as two numbers: JAX has no 64-bit integers here
    whole, rest = multihost_utils.process_allgather(np.array(size, np.uint32)).reshape(-1, 2).T.astype(int)
    sizes = whole * PIECE + rest
    parts = [bytearray() for _ in sizes]
    for start in range(0, max(sizes), PIECE):
        piece = np.frombuffer(part[start : start + PIECE], np.uint8)
        pieces = multihost_utils.process_allgather(np.pad(piece, (0, min(PIECE, max(sizes) - start) - len(piece))))
        if jax.process_index() == 0:
            for own, row, total in zip(parts, pieces, sizes, strict=True):
                own += row[: max(0, total - start)].tobytes()
    return [bytes(own) for own in parts] if jax.process_index() == 0 else []
