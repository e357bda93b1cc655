"""Train in JAX, on all devices of one process or of many.

    python -m jax_impl.main --config=configs/digits.py --workdir=runs/digits

Run again with the same arguments to resume.  Several processes: on SLURM or TPU pods add --distributed, elsewhere
--coordinator=HOST:PORT --num_processes=N --process=I to each.
"""

from configs import resolve
from configs.flags import config, run, workdir
from data import signals
from evaluation.logs import setup_logging
from evaluation.processes import ending_together
from jax_impl.devices import define_flags, make_board, start_jax, wait_for_all
from jax_impl.train import train


def main():
    """Check the config and train."""
    setup_logging()
    c = resolve.check(config())
    start_jax(c)
    with ending_together(make_board(), wait_for_all), signals.caught():
        train(c, workdir())


if __name__ == "__main__":
    define_flags()
    run(main)
