"""Divides a batch among devices and micro-batches, with the same fraction of flow rows in each part.

The objective must not depend on how the batch is divided; divisions that would change it are refused.
"""

import fractions
from collections.abc import Iterable, Iterator

from meanflow.config import options
from meanflow.errors import UserError

LARGEST = 10**6  # largest denominator; float64 rounding never turns one such fraction into another
CLOSE = 1e-9  # maximum distance between a float and the fraction it stands for


def exact(share: float) -> fractions.Fraction:
    """Return the fraction that a float stands for: 3/10 for 0.3, and for 0.1 + 0.2 as well."""
    fraction = fractions.Fraction(share)
    simple = fraction.limit_denominator(LARGEST)
    return simple if abs(simple - fraction) < CLOSE else fraction


def split(num_rows: int, share: float) -> tuple[int, int, int]:
    """Return (groups, flow, jvp): rows come in groups of `flow` flow rows followed by `jvp` rows with r < t.

    Groups are as small as the share allows.  A row's kind follows from its position in the batch, so dividing the batch
    into whole groups does not change it.  Raises UserError unless `num_rows` is a whole number of groups.
    """
    fraction = exact(share)
    groups, left = divmod(num_rows, fraction.denominator)
    if left:
        raise UserError(f"{share} of {num_rows} rows is {num_rows * share} rows, not a whole number")
    return groups, fraction.numerator, fraction.denominator - fraction.numerator


def check(config: options.Config, devices: int, kind: str) -> None:
    """Raise UserError unless a step divided over `devices` equals a step on the whole batch.

    Every device needs a whole number of rows and of flow rows; log_variance_pairs = all needs the whole batch at once.
    kind: what messages call devices.
    """
    batch, accumulate, c = config.train.batch_size, config.train.accumulate, config.method
    parts = devices * accumulate
    if batch % parts:
        raise UserError(
            f"config.train.batch_size {batch} is not divisible by {parts} ({devices} {kind} times "
            f"config.train.accumulate {accumulate}): {ways_out(config, devices)}"
        )
    if "flow_rows" in c and not whole_share(config, batch, parts, c.flow_fraction):
        num = batch if c.flow_rows == "front" else batch // parts
        rows = f"{batch} rows of a batch" if c.flow_rows == "front" else f"{num} rows that each device computes at once"
        raise UserError(
            f"config.method.flow_fraction {c.flow_fraction} of the {rows} (config.train.batch_size {batch}, {devices} "
            f"{kind}, config.train.accumulate {accumulate}) is {num * c.flow_fraction} rows, not a whole number: "
            f"{ways_out(config, devices)}"
        )
    if "log_variance_pairs" in c and c.log_variance_pairs == "all" and parts > 1:
        raise UserError(
            "config.method.log_variance_pairs is all, which pairs every row of a batch with every other, but "
            f"{devices} {kind} times config.train.accumulate {accumulate} divide the batch: set "
            "--config.method.log_variance_pairs=row, or train on one device with --config.train.accumulate=1"
        )


def whole_share(config: options.Config, batch: int, parts: int, fraction: float) -> bool:
    """Return whether `fraction` of each equal part of a batch (flow_rows = front: of the batch) is a whole number.

    True for methods without flow rows, and for flow_rows = coin.
    """
    c = config.method
    if "flow_rows" not in c or c.flow_rows == "coin":
        return True
    if c.flow_rows == "front":  # rounded as in the official code
        return int(batch * fraction) == batch * exact(fraction)
    return batch // parts % exact(fraction).denominator == 0


def ways_out(config: options.Config, devices: int) -> str:
    """Return, as text, the options that would make the batch divisible, with the nearest values of each."""
    batch, accumulate, c = config.train.batch_size, config.train.accumulate, config.method
    fraction = c.flow_fraction if "flow_rows" in c else 0.0
    parts = devices * accumulate

    def fits(batch: int = batch, accumulate: int = accumulate, fraction: float = fraction) -> bool:
        parts = devices * accumulate
        return batch % parts == 0 and whole_share(config, batch, parts, fraction)

    ways: dict[str, list] = {
        "train.batch_size": nearest(batch, max(4 * batch, 4096), lambda size: fits(batch=size)),
        "train.accumulate": nearest(accumulate, batch // devices, lambda number: fits(accumulate=number)),
    }
    if "flow_rows" in c:
        num = batch if c.flow_rows == "front" else max(batch // parts, 1)
        below = int(exact(fraction) * num)
        ways["method.flow_fraction"] = [share for share in (below / num, (below + 1) / num) if fits(fraction=share)]
    if batch % parts == 0:
        ways["method.flow_rows"] = ["coin, by chance"]
    elif not any(ways.values()):  # no nearby size fits the fraction; at least make the batch divisible
        ways["train.batch_size"] = nearest(batch, 2 * parts + batch, lambda size: size % parts == 0)
    return "set " + "; or ".join(f"--config.{name}={' or '.join(map(str, ways[name]))}" for name in ways if ways[name])


def nearest(value: int, most: int, fits) -> list[int]:
    """Return the nearest numbers that fit, one below `value` and one above it (up to `most`), where they exist."""
    searches: tuple[Iterable[int], ...] = range(value - 1, 0, -1), range(value + 1, most + 1)
    found: Iterator[int | None] = (next((n for n in numbers if fits(n)), None) for numbers in searches)
    return [n for n in found if n is not None]
