"""Train in JAX, on all devices of one process or of many.

    python -m jax_impl.main --config=configs/digits.py --workdir=runs/digits

Run again with the same arguments to resume.  Several processes: on SLURM or TPU pods add --distributed, elsewhere
--coordinator=HOST:PORT --num_processes=N --process=I to each.
"""

from jax_impl.devices import define_flags, make_board, start_jax, wait_for_all
from jax_impl.train import train
from meanflow import signals
from meanflow.commands.processes import ending_together
from meanflow.config import checks
from meanflow.config.flags import config, run, workdir
from meanflow.config.workdir import config_of
from meanflow.console_log import setup_logging


def main():
    """Check the config and train."""
    setup_logging()
    c = checks.check(config_of(config(), workdir()))
    start_jax(c)
    with ending_together(make_board(), wait_for_all), signals.caught():
        train(c, workdir())


if __name__ == "__main__":
    define_flags()
    run(main)
