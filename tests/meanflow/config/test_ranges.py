"""Every number of a config has a range, which is the documented one and is held at both ends."""

import math
import pathlib
import re

import numpy as np
import pytest

from configs import digits
from meanflow.config import options, ranges, resolve
from meanflow.errors import UserError

DOCUMENTED = re.compile(r"^    c\.(\w+) = .*?#.*\bin ([\[(])(-?[\d.]+), (-?[\d.]+)([\])])", re.MULTILINE)
FLAT = resolve.flatten(options.get_config())
NUMBERS = {key: a for key, a in FLAT.items() if isinstance(a, int | float) and not isinstance(a, bool)}


def test_every_number_has_a_range():
    together = {"method.guidance_start", "method.guidance_end"}  # checked by `rules.check_method`
    assert ranges.RANGES.keys() == NUMBERS.keys() - together
    assert all(ranges.contains(interval, NUMBERS[key]) for key, interval in ranges.RANGES.items())


@pytest.mark.parametrize("key", ranges.RANGES)
def test_a_range_is_held_at_both_ends(key):
    interval = ranges.RANGES[key]
    refused, accepted = [math.nan, math.inf, -math.inf], []
    for end, direction, closed in zip(
        ranges.ends(interval), (-1, 1), (interval[0] == "[", interval[-1] == "]"), strict=True
    ):
        if math.isfinite(end):
            beyond = float(np.nextafter(end, direction * math.inf))
            inside = float(np.nextafter(end, -direction * math.inf))
            refused += [beyond] if closed else [beyond, end]
            accepted += [end, inside] if closed else [inside]
    for value in accepted:
        ranges.check(FLAT | {key: value})
    for value in refused:
        with pytest.raises(UserError, match=rf"^config\.{key} is {re.escape(str(value))}; it must be "):
            ranges.check(FLAT | {key: value})


def documented():
    """Return (option, left bracket, least, most, right bracket) of the comments in meanflow/config/options.py."""
    text = pathlib.Path(options.__file__).read_text()
    sections = re.split(r"^def (\w+)\(", text, flags=re.MULTILINE)[1:]
    return [
        (f"{section}.{found[0]}", *found[1:])
        for section, body in zip(sections[::2], sections[1::2], strict=True)
        for found in DOCUMENTED.findall(body)
        if f"{section}.{found[0]}" in NUMBERS
    ]


def test_the_documented_ranges_are_found():
    assert {key for key, *_ in documented()} >= {"method.kappa", "method.flow_fraction", "model.dropout"}


@pytest.mark.parametrize(("key", "left", "least", "most", "right"), documented())
def test_what_is_documented_is_checked(key, left, least, most, right):
    """In a config that reads the option."""
    for end, closed, direction in ((least, left == "[", -1), (most, right == "]", 1)):
        config = digits.get_config("unet" if key.startswith("model.") else "")
        config.update_from_flattened_dict({key: float(end)})
        if closed:
            resolve.check(config)
            config.update_from_flattened_dict({key: float(end) + direction * 1e-9})
        with pytest.raises(UserError, match=re.escape(f"config.{key} is ")):
            resolve.check(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method.kappa": 1.0}, "config.method.kappa is 1.0; it must be at least 0 and less than 1"),
        ({"train.learning_rate": math.inf}, "learning_rate is inf; it must be at least 0 and finite"),
        ({"method.omega": math.nan}, "omega is nan; it must be a finite number"),
        ({"method.omega_max": math.inf}, "omega_max is inf; it must be at least 1 and finite"),
        ({"method.time_mean": (math.nan, 0.0)}, "time_mean is (nan, 0.0); give two numbers"),
        ({"method.time_std": (1.0, -1.0)}, "time_std is (1.0, -1.0); deviations are at least 0"),
        ({"method.guidance_end": math.nan}, "guidance_end are 0.0 and nan"),
        ({"train.ema_decays": (0.9, math.nan)}, "at least one decay in [0, 1)"),
        ({"sample.times": (1.0, math.nan, 0.0)}, "times is (1.0, nan, 0.0): sampling times must fall"),
        ({"sample.times": (1.0, 0.5, 0.5)}, "sampling times must fall"),
        ({"sample.times": (1.5, 0.0)}, "sampling times must fall"),
        ({"sample.interval": (0.0, math.nan)}, "interval"),
    ],
)
def test_values_that_are_no_numbers_or_beyond_their_range_are_named(changes, message):
    config = digits.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=re.escape(message)):
        resolve.check(config)


def test_taps_of_a_filter_are_numbers():
    config = digits.get_config("unet")
    config.model.resample_filter = (1, math.nan)
    with pytest.raises(UserError, match="resample_filter is"):
        resolve.check(config)
