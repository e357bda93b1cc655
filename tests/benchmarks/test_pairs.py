"""Paired runs: what a ratio means on a machine whose speed changes, and what it is compared with."""

import pytest

from benchmarks import cases, measure


class Work:
    """A step that takes so many seconds where the machine runs at full speed."""

    def __init__(self, cost):
        self.cost = cost


@pytest.fixture
def slowing(monkeypatch):
    """Let every measured step take as long as if the machine had slowed down by a tenth of its pace since the last."""
    taken = []

    def seconds(step):
        taken.append(step)
        return step.cost * (1 + len(taken) / 10)

    monkeypatch.setattr(measure, "seconds", seconds)
    return taken


def test_a_machine_that_slows_down_does_not_change_a_ratio(slowing):
    steps = {cases.FLOW_MATCHING: Work(1), "twice": Work(2), "thrice": Work(3)}
    times, around = measure.take_turns(steps, 4)
    ratios = {name: [a / b for a, b in zip(times[name], around[name], strict=True)] for name in steps}
    assert ratios == {name: pytest.approx([step.cost] * 4) for name, step in steps.items()}
    assert [step.cost for step in slowing[:5]] == [1, 2, 1, 3, 1]


def test_a_step_is_compared_with_one_whose_extra_work_runs_as_fast_as_a_matmul():
    config = cases.system_config("meanflow", "S", 8)
    case = cases.Case("guided", config, limit=1.5)
    # 3F = 60 FLOPs of flow matching took 2 s, at half the rate of a matmul; the 30 more took 0.4 s.
    shared = {"forward_flops": 20, "flow_matching_of_matmul_rate": 0.5}
    row = measure.figures(case, {"guided": [2.4]}, {"guided": 1.2}, {"guided": 90, cases.FLOW_MATCHING: 60}, shared)
    assert row["ratio_at_matmul_rate"] == pytest.approx(1.25)  # 30 FLOPs at 60 FLOP/s: 0.5 s
    assert row["share_of_matmul_rate"] == pytest.approx(90 / 2.4 / 60)
