"""Judge a trained model: generate, compare with the real images, print one JSON line, write DIR/evaluation.json.

python torch_impl/evaluate.py --workdir=runs/digits
python torch_impl/evaluate.py --workdir=runs/imf --omegas=1,2,4,8 --intervals=0:1,0.4:0.65

The second judges every guidance scale with every interval of it (improved MeanFlow only): it prints a table, and
writes DIR/sweep.json and DIR/sweep.html.
"""

from configs.flags import run
from evaluation import sweep
from evaluation.logs import setup_logging
from torch_impl.sample import load


def main():
    """Load and evaluate: once, or for every guidance of a sweep."""
    setup_logging()
    sweep.evaluate(load)


if __name__ == "__main__":
    sweep.define_flags()
    run(main)
