"""Lower bounds of the time that a step, a run and samples take, from FLOPs, bytes and the public peaks of a card."""

from typing import NamedTuple

from benchmarks.rehearsal import cards
from meanflow.commands.flops import of_step
from meanflow.config.stages import stages

SAMPLES = 50_000  # of an FID
SENT = {  # by each of n cards of a ring, relative to the bytes of the result
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
}


class Bounds(NamedTuple):
    """Seconds of a step, each alone, and what follows for the whole run; nothing runs in less."""

    flops: float  # of a step on one card, by the formula
    arithmetic: float  # at the card's peak for the dtype of the products
    memory: float  # to read and write the state once, and each temporary once
    communication: float  # to send gradients, and gathered parameters, over the links of the card
    step: float  # the largest of the three: they may overlap
    run_days: float
    gpu_hours: float
    samples: float  # seconds for `SAMPLES` samples on all cards


def of(config, report: dict, card: cards.Card, num_cards: int) -> Bounds:
    """Return the bounds of a rehearsed config.  report: of `rehearse`.

    The state: parameters, gradients and moments are read once and all but the gradients written; each EMA is read and
    written when it is due.  Temporaries are written and read once.
    """
    parts, forward, c = report["parts"], report["forward_flops"], config.train
    flops = of_step(stages(config)[-1], forward) / num_cards
    touched = 2 * parts["parameters"] + 2 * parts["optimizer"] + 2 * parts["gradients"]
    touched += 2 * parts["ema"] / c.ema_every + 2 * parts["temporaries"]
    sent = sum(SENT.get(kind, lambda n: 1)(num_cards) * a["bytes"] for kind, a in report["collectives"].items())
    seconds = flops / cards.peak(card, config), touched / card.bandwidth, sent / card.link
    step = max(seconds)
    per_sample = forward * sampling_forwards(config)
    samples = SAMPLES * per_sample / (cards.peak(card, config) * num_cards)
    hours = step * c.steps / 3600
    return Bounds(flops, *seconds, step, hours / 24, hours * num_cards, samples)


def sampling_forwards(config) -> float:
    """Return how many forwards an image takes: its steps, and twice as many with guidance at sampling."""
    c = config.sample
    return c.steps * (2 if getattr(c, "cfg_scale", 1) != 1 else 1)
