"""The share of flow rows in a batch, and which divisions of a batch are refused."""

import fractions
import itertools
import re

import pytest

from configs import digits, dmf_imagenet, imf_imagenet, meanflow_cifar10, meanflow_imagenet, remeanflow_imagenet
from meanflow.config import checks, division, options
from meanflow.errors import UserError

SHARES = (0.0, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.75, 0.9, 1 - 0.9, 0.1 + 0.2, 1.0)


def config_of(batch=64, accumulate=1, variant="", **method):
    config = digits.get_config(variant)
    config.train.update(batch_size=batch, accumulate=accumulate)
    config.method.update(method)
    return config


@pytest.mark.parametrize(
    ("number", "fraction"),
    [(0.3, "3/10"), (0.1 + 0.2, "3/10"), (1 - 0.9, "1/10"), (1 / 3, "1/3"), (0, "0"), (1.0, "1"), (0.29, "29/100")],
)
def test_a_share_is_the_fraction_that_it_stands_for(number, fraction):
    assert division.exact(number) == fractions.Fraction(fraction)


def test_a_share_near_nothing_is_not_nothing():
    assert division.exact(1e-8) > 0


@pytest.mark.parametrize("number", SHARES)
def test_a_row_is_a_flow_row_however_the_batch_is_divided(number):
    """Each part holds the share and the pattern of the whole, or cannot be."""
    total = 240

    def pattern(num_rows):
        groups, flow, rest = division.split(num_rows, number)
        return groups * (flow * [True] + rest * [False])

    whole = pattern(total)
    assert sum(whole) == pytest.approx(total * number) and len(whole) == total
    for parts in (2, 3, 8, 24, 240):
        if (total // parts * division.exact(number)).denominator == 1:
            assert pattern(total // parts) * parts == whole
        else:
            with pytest.raises(UserError, match="not a whole number"):
                pattern(total // parts)


@pytest.mark.parametrize(
    ("fraction", "batch", "devices", "accumulate", "expected"),
    [
        (0.75, 16, 1, 8, "is 1.5 rows, not a whole number: set --config.train.batch_size=32; or "
         "--config.train.accumulate=4; or --config.method.flow_fraction=0.5 or 1.0; or --config.method.flow_rows=coin"),
        (0.75, 16, 8, 1, "of the 2 rows that each device computes at once"),
        (0.75, 8, 8, 1, "is 0.75 rows"),
        (0.25, 8, 2, 2, "is 0.5 rows"),
        (0.3, 32, 1, 1, "set --config.train.batch_size=30 or 40; or --config.method.flow_fraction=0.28125 or 0.3125"),
        (0.75, 48, 2, 4, "--config.train.batch_size=32 or 64; or --config.train.accumulate=3 or 6;"),
        (0.75, 30, 4, 1, "batch_size 30 is not divisible by 4 (4 devices times config.train.accumulate 1): set "
         "--config.train.batch_size=16 or 32"),
        (0.333333, 64, 1, 1, "--config.method.flow_fraction=0.328125 or 0.34375"),
    ],
)  # fmt: skip
def test_a_share_that_a_division_would_change_is_refused(fraction, batch, devices, accumulate, expected):
    config = config_of(batch, accumulate, flow_fraction=fraction)
    with pytest.raises(UserError) as error:
        checks.check_divisible(config, devices, "devices")
    assert expected in str(error.value)
    assert all(f"config.train.{name} " in str(error.value) for name in ("batch_size", "accumulate"))
    assert f"{devices} devices" in str(error.value)


def test_sizes_that_would_be_refused_again_are_not_advised():
    config = config_of(30, flow_fraction=0.3333)  # whole in multiples of 10,000 only
    with pytest.raises(UserError, match="rows, not a whole number: set --config.method.flow_fraction=0.3 or 0.33333"):
        checks.check_divisible(config, 1, "devices")


@pytest.mark.parametrize("flow_rows", ["split", "front"])
@pytest.mark.parametrize("variant", ["", "imf", "remeanflow"])
def test_what_a_refusal_advises_is_accepted(variant, flow_rows):
    cases = itertools.product((0.1, 1 / 3, 0.75), (7, 24, 30, 100), (1, 2, 8), (1, 2, 5))
    refused = 0
    for fraction, batch, devices, accumulate in cases:
        config = config_of(batch, accumulate, variant, flow_rows=flow_rows, flow_fraction=fraction)
        try:
            checks.check_divisible(config, devices, "processes")
        except UserError as error:
            refused += 1
            advice = str(error).partition(": set ")[2]
            ways = re.findall(r"--config\.([\w.]+)=([\w.]+)(?: or ([\w.]+))?", advice)
            assert ways and ways[0][0] == "train.batch_size"
            for option, *values in ways:
                for value in filter(None, values):
                    kind = type(config[option.split(".")[0]][option.split(".")[1]])
                    changed = config_of(batch, accumulate, variant, flow_rows=flow_rows, flow_fraction=fraction)
                    changed.update_from_flattened_dict({option: kind(value)})
                    checks.check_divisible(changed, devices, "processes")
    assert refused > 20


@pytest.mark.parametrize(
    ("variant", "changes"), [("flow", {}), ("dmf", {}), ("", {"flow_rows": "coin", "flow_fraction": 0.3})]
)
def test_no_share_is_asked_of_methods_that_do_not_split(variant, changes):
    checks.check_divisible(config_of(8, 1, variant, **changes), 8, "devices")
    with pytest.raises(UserError, match="8 is not divisible by 16 .*: set --config.train.batch_size=16"):
        checks.check_divisible(config_of(8, 1, variant, **changes), 16, "devices")


def test_the_share_of_the_first_rows_is_that_of_the_whole_batch():
    config = config_of(8, 4, flow_rows="front", flow_fraction=0.75)
    checks.check_divisible(config, 2, "devices")
    config.train.update(batch_size=6, accumulate=1)
    with pytest.raises(UserError, match="of the 6 rows of a batch .* is 4.5 rows"):
        checks.check_divisible(config, 2, "devices")
    config.method.flow_fraction, config.train.batch_size = 0.29, 100  # int(100 * 0.29) is 28
    with pytest.raises(UserError, match="not a whole number"):
        checks.check_divisible(config, 1, "devices")


def test_pairs_of_log_variances_are_of_the_whole_batch():
    config = config_of(8, 1, "dmf", log_variance_pairs="all")
    checks.check_divisible(config, 1, "processes")
    for devices, accumulate in ((2, 1), (1, 2)):
        config.train.accumulate = accumulate
        with pytest.raises(UserError, match="log_variance_pairs=row, or train on one device with"):
            checks.check_divisible(config, devices, "processes")


PUBLISHED = [
    (meanflow_imagenet, tuple(meanflow_imagenet.VARIANTS), (8, 16, 32, 64)),
    (imf_imagenet, tuple(imf_imagenet.VARIANTS), (8, 16, 32, 64)),
    (dmf_imagenet, tuple(dmf_imagenet.VARIANTS), (8, 16, 32, 64)),
    (remeanflow_imagenet, remeanflow_imagenet.VARIANTS, (8, 16, 32)),
    (meanflow_cifar10, ("v0", "v1", "reproduction"), (8, 16, 32, 64)),
    (digits, ("", *digits.VARIANTS), (2, 4, 8, 16)),
]


@pytest.mark.parametrize(("module", "variants", "devices"), PUBLISHED)
def test_published_settings_run_on_the_usual_numbers_of_devices(module, variants, devices):
    """On one, two and four, too, for those who have fewer, with micro-batches."""
    for variant, num in itertools.product(variants, (1, 2, 4, *devices)):
        config = module.get_config(variant)
        checks.check_divisible(config, num, "devices")
        config.train.accumulate = max(1, 8 // num)
        checks.check_divisible(config, num, "devices")


def test_shards_of_parameters_that_do_not_divide_the_devices():
    config = config_of(64)
    config.train.fsdp = 3
    with pytest.raises(UserError, match="fsdp 3 does not divide the 8 devices: set it to 1 or 2 or 4 or 8"):
        checks.check_divisible(config, 8, "devices")


def test_base_is_checked_too():
    with pytest.raises(UserError, match="flow_fraction 0.75"):
        checks.check_divisible(options.get_config(), 128, "devices")
