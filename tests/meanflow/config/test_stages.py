"""Which of a run's steps are guided, and which clip their gradients."""

import pytest
import tiny

from configs import digits
from meanflow.config import options, stages, store


def config_of(**changes):
    return tiny.compose({"method.name": "rectified", "train.clip_norm": 0.7} | changes)


def held(config):
    """Return (guidance, clip_norm) of each stage."""
    return [(c.method.guidance, c.train.clip_norm) for c in stages.stages(config)]


@pytest.mark.parametrize(
    ("stage1_steps", "order", "guidance", "clip_stage", "expected"),
    [
        (0, "plain_first", True, "all", [(True, 0.7)]),
        (0, "plain_first", False, "all", [(False, 0.7)]),
        (0, "plain_first", True, "guided", [(True, 0.7)]),
        (0, "plain_first", False, "guided", [(False, 0.0)]),
        (0, "guided_first", True, "all", [(True, 0.7)]),
        (0, "guided_first", False, "guided", [(False, 0.0)]),
        (3, "plain_first", True, "all", [(False, 0.7), (True, 0.7)]),
        (3, "plain_first", True, "guided", [(False, 0.0), (True, 0.7)]),
        (3, "guided_first", True, "all", [(True, 0.7), (False, 0.7)]),
        (3, "guided_first", True, "guided", [(True, 0.7), (False, 0.0)]),
    ],
)
def test_the_stages_of_a_run(stage1_steps, order, guidance, clip_stage, expected):
    config = config_of(**{
        "method.stage1_steps": stage1_steps, "method.stage_order": order, "method.guidance": guidance,
        "train.clip_stage": clip_stage,
    })  # fmt: skip
    before = store.flatten(config)
    assert held(config) == expected
    at = [stages.stage_at(config, step) for step in range(6)]
    assert at == ([0, 0, 0, 1, 1, 1] if stage1_steps else [0] * 6)
    assert store.flatten(config) == before
    for stage in stages.stages(config):
        changed = {key for key, value in store.flatten(stage).items() if value != before[key]}
        assert changed <= {"method.guidance", "train.clip_norm"}
        stage.method.omega = 123.0
        assert config.method.omega == before["method.omega"]


@pytest.mark.parametrize(
    ("network", "method"), [("dit", "meanflow"), ("imf_dit", "improved"), ("dit", "flow"), ("dmf_dit", "decoupled")]
)
def test_other_methods_have_one_stage_which_is_their_config(network, method):
    config = options.get_config(network, method)
    assert len(stages.stages(config)) == 1 and stages.stages(config)[0] is config
    assert [stages.stage_at(config, step) for step in (0, 2, 3, 100)] == [0] * 4


def test_the_demo_learns_a_plain_velocity_first_and_clips_the_guided_one():
    config = digits.get_config("remeanflow")
    assert held(config) == [(False, 0.0), (True, 1.0)]
    assert [stages.stage_at(config, step) for step in (0, 249, 250, 499)] == [0, 0, 1, 1]
