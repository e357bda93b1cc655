"""Devices and processes: what the flags and the cluster say."""

import jax
from absl import flags

from configs.errors import UserError

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
