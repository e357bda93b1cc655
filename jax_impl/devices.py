"""Devices and processes: what the flags and the cluster say."""

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import AxisType

from configs.errors import UserError

PIECE = 2**26  # bytes of each process on the devices at a time

flags.disclaim_key_flags()  # the flags are those of the command that has them defined, and --help shows them as such


def define_flags():
    """Define the flags of commands that run in several processes."""
    flags.DEFINE_bool("distributed", False, "Join the processes that the cluster's scheduler started.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for processes started by hand.")
    flags.DEFINE_integer("num_processes", 1, "Processes in all, with --coordinator.", lower_bound=1)
    flags.DEFINE_integer("process", 0, "Number of this process, with --coordinator.", lower_bound=0)
    flags.DEFINE_integer("cpu_devices", 0, "Split the CPU into this many devices, to try out sharding.", lower_bound=0)


def start_jax(c):
    """Set matmul precision and devices, and join the other processes if there are any.

    c: the config.  Raises UserError if they cannot be joined.
    """
    f = flags.FLAGS
    jax.config.update("jax_default_matmul_precision", c.train.matmul_precision)
    jax.config.update("jax_enable_x64", c.model.compute_dtype == "float64")
    if f.cpu_devices:
        jax.config.update("jax_num_cpu_devices", f.cpu_devices)
    if f.distributed or f.coordinator:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        where = (f.coordinator, f.num_processes, f.process) if f.coordinator else ()
        try:
            jax.distributed.initialize(*where)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"cannot join the other processes: {str(error).splitlines()[0]}") from error


def start_alone(config):
    """Return the number of this process and how many there are; from here on each works alone."""
    f = flags.FLAGS
    if f.coordinator:  # the flags say all there is to know
        place = f.process, f.num_processes
        f["coordinator"].value = None
        start_jax(config)
        return place
    start_jax(config)
    place = jax.process_index(), jax.process_count()
    jax.distributed.shutdown()  # else one that ends early would wait for the others, and one that dies end them
    return place


def local_mesh(devices=None):
    """Return the mesh (data, fsdp) of devices of this process, by default all, on which parameters are whole."""
    devices = devices or jax.local_devices()
    return jax.make_mesh((len(devices), 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def gather(part):
    """Return the bytes that each process calls it with, in the order of the processes; nothing but in the first one."""
    if jax.process_count() == 1:
        return [part]
    size = divmod(len(part), PIECE)  # in two numbers, for JAX has no 64 bits here
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
