"""The stages of a run: which config applies at which step.  Only Re-MeanFlow has more than one stage."""

import copy

from meanflow.config import options


def stages(config: options.Config) -> tuple[options.Config, ...]:
    """Return the config of each stage in order: `config` itself, or Re-MeanFlow's plain and guided stages.

    With train.clip_stage = guided, a stage without guidance does not clip.
    """
    c = config.method
    if "stage1_steps" not in c:
        return (config,)
    guided = (c.stage_order == "guided_first", c.stage_order == "plain_first") if c.stage1_steps else (c.guidance,)
    return tuple(stage(config, guidance) for guidance in guided)


def stage(config: options.Config, guidance: bool) -> options.Config:
    """Return the config of a stage with or without guidance."""
    config = copy.deepcopy(config)
    config.method.guidance = guidance
    if config.train.clip_stage == "guided" and not guidance:
        config.train.clip_norm = 0.0
    return config


def stage_at(config: options.Config, step: int) -> int:
    """Return the stage index of the next step, after `step` completed steps."""
    c = config.method
    return int("stage1_steps" in c and 0 < c.stage1_steps <= step)
