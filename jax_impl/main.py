"""Train in JAX, on all devices of one process or of many.

    python -m jax_impl.main --config=configs/digits.py --workdir=runs/digits

Run again with the same arguments to resume.  Several processes: on SLURM or TPU pods add --distributed, elsewhere
--coordinator=HOST:PORT --num_processes=N --process=I to each.
"""

import jax
from absl import flags

from configs import resolve
from configs.errors import UserError
from configs.flags import config, run, workdir
from evaluation.logs import setup_logging
from jax_impl.train import train

flags.DEFINE_bool("distributed", False, "Join the processes that the cluster's scheduler started.")
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for processes started by hand.")
flags.DEFINE_integer("num_processes", 1, "Processes in all, with --coordinator.", lower_bound=1)
flags.DEFINE_integer("process", 0, "Number of this process, with --coordinator.", lower_bound=0)
flags.DEFINE_integer("cpu_devices", 0, "Split the CPU into this many devices, to try out sharding.", lower_bound=0)


def start_jax(c):
    """Set matmul precision and devices, and join the other processes if there are any."""
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


def main():
    """Check the config and train."""
    setup_logging()
    c = resolve.check(config())
    start_jax(c)
    train(c, workdir())


if __name__ == "__main__":
    run(main)
