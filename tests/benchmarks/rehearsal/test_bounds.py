"""Cards and lower bounds, by hand."""

import pytest

from benchmarks.rehearsal import bounds, cards
from meanflow.config import store
from meanflow.errors import UserError

H100 = cards.CARDS["h100"]


def test_an_unknown_card_is_refused_with_those_that_are_known():
    with pytest.raises(
        UserError, match="--card=v100: there are numbers for h100, h200, a100, a100-40, l40s, rtx4090, b200"
    ):
        cards.find("v100")


@pytest.mark.parametrize("name", cards.CARDS)
def test_the_numbers_of_a_card_are_of_one_size(name):
    card = cards.find(name)
    assert 20e9 < card.memory < 200e9 and 0.9 < cards.usable(card) / card.memory < 1
    assert card.float32 <= card.tf32 <= card.bfloat16
    assert 5e11 < card.bandwidth < 1e13 and card.link < card.bandwidth


def test_a_step_is_bounded_by_arithmetic_memory_and_links():
    """MeanFlow B/4 at a batch of 256: 4 + p forwards, p = 0.25 here, kappa = 0."""
    config = store.load_file("configs/meanflow_imagenet.py:b4")
    config.method.update(flow_fraction=0.75, kappa=0.0)
    report = {
        "forward_flops": 1e9,
        "parts": {"parameters": 4e9, "optimizer": 8e9, "ema": 4e9, "gradients": 4e9, "temporaries": 10e9, "batch": 1e6},
        "collectives": {"all-reduce": {"count": 3, "bytes": 4e9}, "all-gather": {"count": 1, "bytes": 8e9}},
    }
    found = bounds.of(config, report, H100, 8)
    assert found.flops == pytest.approx(4.25 * 1e9 * 256 / 8)
    assert found.arithmetic == pytest.approx(found.flops / 989.4e12)
    assert found.memory == pytest.approx((2 * (4 + 8 + 4 + 4 + 10) * 1e9) / 3.352e12)
    assert found.communication == pytest.approx((2 * 7 / 8 * 4e9 + 7 / 8 * 8e9) / 450e9)
    assert found.step == max(found.arithmetic, found.memory, found.communication)
    assert found.gpu_hours == pytest.approx(found.step * config.train.steps * 8 / 3600)
    assert found.run_days == pytest.approx(found.gpu_hours / 8 / 24)
    assert found.samples == pytest.approx(50_000 * 1e9 / (8 * 989.4e12))


def test_float32_runs_at_the_peak_of_its_precision():
    config = store.load_file("configs/digits.py")
    rates = {}
    for precision in ("highest", "high"):
        config.train.matmul_precision = precision
        rates[precision] = cards.peak(H100, config)
    assert rates == {"highest": H100.float32, "high": H100.tf32}
