"""FLOPs as the frameworks count them: those of the forwards that the mathematics needs, and no more."""

import functools
import importlib

import pytest

from benchmarks import cases

SMALL = ["model.depth=2", "model.width=128", "model.num_heads=2", "train.batch_size=16"]
FRAMEWORKS = ("jax", "torch")


@functools.cache
def counted(framework, *settings):
    """Return {name: (FLOPs over those of flow matching, limit)} of a small transformer."""
    steps = importlib.import_module(f"benchmarks.{framework}_steps")
    config = cases.override(cases.system_config("meanflow", "S", 8), [*SMALL, *settings])
    table = cases.make_cases(config, [0.25, 0.5])
    flops = {case.name: steps.count_step(case.config, cases.make_batch(case.config)) for case in table}
    return {case.name: (flops[case.name] / flops[cases.FLOW_MATCHING], case.limit) for case in table}


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("p", [0.25, 0.5])
@pytest.mark.parametrize("kind", ["none", "kappa0", "kappa"])
def test_a_step_counts_as_many_flops_as_its_limit(framework, p, kind):
    ratio, limit = counted(framework)[f"p={p}, guidance {kind}"]
    assert ratio == pytest.approx(limit, rel=0.03)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_step_whose_rows_are_not_split_counts_too_many(framework):
    steps = importlib.import_module(f"benchmarks.{framework}_steps")
    config = cases.override(cases.system_config("meanflow", "S", 8), [*SMALL, "method.flow_rows=coin"])
    flow, case = cases.make_cases(config, [0.25], ["none"])
    flops = [steps.count_step(c.config, cases.make_batch(c.config)) for c in (flow, case)]
    assert flops[1] / flops[0] > 1.15 * case.limit


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_step_of_flow_matching_is_three_forwards(framework):
    steps = importlib.import_module(f"benchmarks.{framework}_steps")
    config = cases.override(cases.system_config("meanflow", "S", 8), SMALL)
    [flow] = cases.make_cases(config, [0.25], [])
    batch = cases.make_batch(flow.config)
    assert 3 * steps.count_forward(flow.config, batch) == pytest.approx(steps.count_step(flow.config, batch), rel=0.03)


def test_jax_counts_in_the_program_of_a_cpu(monkeypatch):
    """XLA counts in no program of a GPU before compiling it.  The default device stands in for one."""
    import jax
    from jax._src import xla_bridge
    from jax._src.interpreters import pxla

    from benchmarks import jax_steps

    asked = []
    monkeypatch.setattr(jax_steps.step, "make_mesh", lambda config: pytest.fail("a mesh of the devices of the step"))
    monkeypatch.setattr(xla_bridge, "using_pjrt_c_api", lambda backend: asked.append(backend.platform))
    assert pxla.xb is xla_bridge
    config = cases.override(cases.system_config("meanflow", "S", 8), SMALL)
    [flow] = cases.make_cases(config, [0.25], [])
    batch = cases.make_batch(flow.config)
    with jax.default_device("gpu"):  # which this machine may not have: whoever computes there fails
        assert jax_steps.count_step(flow.config, batch) > 2 * jax_steps.count_forward(flow.config, batch) > 0
    assert asked == ["cpu", "cpu"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_attention_counts_in_its_plain_form_and_micro_batches_as_one(framework):
    steps = importlib.import_module(f"benchmarks.{framework}_steps")
    config = cases.override(cases.system_config("meanflow", "S", 8), SMALL)
    changed = cases.override(config, ["model.attention=fused", "train.accumulate=4"])
    flops = [steps.count_forward(c, cases.make_batch(c)) for c in (config, changed)]
    assert flops[0] == flops[1]
    assert changed.model.attention == "fused"
