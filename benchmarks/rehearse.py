"""What a training run would need on cards that are not there: memory, collectives, FLOPs and time.

    python benchmarks/rehearse.py --framework=jax --config=configs/meanflow_imagenet.py:xl2 --card=h100
    python benchmarks/rehearse.py --framework=jax --config=configs/imf_imagenet.py:xl2 --card=a100-40 --search
    python benchmarks/rehearse.py --framework=torch --config=configs/meanflow_imagenet.py:xl2 --card=h100 \\
        --devices=8 --nodes=2 --config.train.fsdp=8 --plot=memory.png --json=memory.json

In JAX, XLA compiles the trainer's own step for the card, which takes minutes; in PyTorch, the trainer's own step runs
on fake tensors.  Exit code 1 if the step does not fit the card; then what does fit is tried.
"""

import importlib.util
import sys

from absl import flags

from benchmarks import cases
from benchmarks.rehearsal import bounds, cards, report
from benchmarks.rehearsal.attempts import changed, fits, largest_batch, rehearse, remedy
from meanflow.config import checks, paths
from meanflow.config.flags import config as config_flag
from meanflow.config.flags import run
from meanflow.errors import UserError

flags.DEFINE_enum("framework", None, ["jax", "torch"], "Which trainer.")
flags.DEFINE_string("card", "h100", f"One of {', '.join(cards.CARDS)}.")
flags.DEFINE_integer("devices", 8, "Cards of a host.", lower_bound=1)
flags.DEFINE_integer("nodes", 1, "Hosts.", lower_bound=1)
flags.DEFINE_bool("search", False, "Find the largest batch that fits, by a few more rehearsals.")
flags.DEFINE(paths.WRITTEN, "json", None, "Also write the figures here.")
flags.DEFINE(paths.WRITTEN, "markdown", None, "Also write the tables here.")
flags.DEFINE(paths.WRITTEN, "plot", None, "Plot memory by part against the card's limit to this PNG.")


def main():
    """Rehearse, print and write; exits with code 1 if the step does not fit."""
    f, config = flags.FLAGS, config_flag()
    if config is None or f.framework is None:
        raise UserError("name a trainer and a recipe: --framework=jax --config=configs/meanflow_imagenet.py:b4")
    if f.framework == "jax" and importlib.util.find_spec("tensorflow") is None:
        raise UserError("the rehearsal reads XLA's dumps with TensorFlow: pip install tensorflow-cpu")
    cases.check_measurable(config)
    card, num_cards, config = cards.find(f.card), f.devices * f.nodes, checks.check(config)
    checks.check_divisible(config, num_cards, "devices")

    def attempt(changes):
        return rehearse(f.framework, changed(config, changes), f.card, f.devices, f.nodes)

    found = attempt({})
    found |= {"card": card.title, "cards": num_cards, "fits": fits(found, card), "usable_bytes": cards.usable(card)}
    if f.search:
        by_batch = largest_batch(found, config, card, num_cards, lambda b: attempt({"train.batch_size": b}))
        found["largest_batch"] = by_batch
    found["bounds"] = bounds.of(config, found, card, num_cards)._asdict()
    if not found["fits"]:
        fitting = remedy(config, card, num_cards, attempt)
        found["remedy"] = fitting and {"changes": fitting[0], "peak_bytes": fitting[1]["peak_bytes"]}
    report.write(found, report.title(config, f.framework, card, f.devices, f.nodes), f.markdown, f.json, f.plot)
    if not found["fits"]:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
