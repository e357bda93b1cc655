"""The cases of the benchmarks: what is compared, and what bounds its cost."""

import pytest

from benchmarks import cases
from meanflow.config import store
from meanflow.data import draws
from meanflow.errors import UserError


def make(system="meanflow", shares=(), batch=16, **more):
    """Return {name: case} of a small network."""
    config = cases.system_config(system, "S", 8)
    config.train.batch_size = batch
    return {case.name: case for case in cases.make_cases(config, shares, **more)}


@pytest.mark.parametrize(
    ("p", "limits"), [(0.25, (1.08, 1.42, 1.50)), (0.5, (1.17, 1.50, 1.67)), (1.0, (1.33, 1.67, 2.00))]
)
def test_limits_of_meanflow_are_the_forwards_that_the_mathematics_needs(p, limits):
    found = make(shares=[p])
    names = [f"p={p:g}, guidance {kind}" for kind in ("none", "kappa0", "kappa")]
    assert [round(found[name].limit, 2) for name in names] == list(limits)
    assert found[cases.FLOW_MATCHING].limit == 1


def test_limits_of_the_other_systems():
    assert make("improved")["p=0.5, guidance all"].limit == pytest.approx((5 + 3 * 8 / 12) / 3)
    assert make("improved")["p=0.5, guidance none"].limit == pytest.approx((4 + 3 * 8 / 12) / 3)
    assert {name: case.limit for name, case in make("decoupled").items()} == {
        cases.FLOW_MATCHING: 1, "guidance none": 7 / 3, "guidance all": 10 / 3,
    }  # fmt: skip
    assert {name: case.limit for name, case in make("rectified").items()} == {
        cases.FLOW_MATCHING: 1, "p=0.25, guidance none": 3.25 / 3, "p=0.25, guidance kappa": 1.5,
    }  # fmt: skip


def test_a_share_that_the_batch_cannot_have_is_refused():
    with pytest.raises(UserError, match="flow_fraction 0.75 of the 10 rows"):
        make(shares=[0.25], batch=10)


def test_flow_matching_has_flow_rows_alone_however_the_cases_split_theirs():
    config = cases.override(cases.system_config("meanflow", "S", 8), ["method.flow_rows=coin"])
    config.train.batch_size = 16
    found = {case.name: case.config.method for case in cases.make_cases(config, [1.0])}
    flow, one = found[cases.FLOW_MATCHING], found["p=1, guidance none"]
    assert (flow.flow_rows, flow.flow_fraction, flow.guidance) == ("split", 1.0, False)
    assert (one.flow_rows, one.flow_fraction) == ("coin", 0.0)


@pytest.mark.parametrize(
    ("preset", "num"),
    [("meanflow_imagenet.py:b4", 4), ("meanflow_cifar10.py", 2), ("imf_imagenet.py", 3), ("dmf_imagenet.py", 3),
     ("dmf_imagenet.py:sit_256", 1), ("remeanflow_imagenet.py:512", 3), ("digits.py:remeanflow", 3)],
)  # fmt: skip
def test_every_preset_has_the_cases_of_its_system_in_one_stage(preset, num):
    config = store.load_file(f"configs/{preset}")
    found = cases.make_cases(config, ())
    assert len(found) == num
    assert {case.config.method.get("stage1_steps", 0) for case in found} == {0}
    assert cases.make_batch(cases.override(config, ["train.batch_size=4"]))["image"].shape[0] == 4


def test_a_batch_has_what_network_and_method_read():
    def names(preset):
        batch = cases.make_batch(cases.override(store.load_file(preset), ["train.batch_size=2"]))
        return set(draws.split(batch)[0])

    assert names("configs/meanflow_cifar10.py") == {"image", "label", "augment"}
    assert names("configs/remeanflow_imagenet.py") == {"image", "label", "noise"}
    assert names("configs/dmf_imagenet.py:sit_256") == {"image", "label", "features"}


def test_a_variant_follows_its_case():
    found = make(variants=["eager"], kinds=["none"])
    assert list(found)[:2] == [cases.FLOW_MATCHING, "flow matching, eager"]
    assert found["flow matching, eager"].of == cases.FLOW_MATCHING
    assert [case.config.train.compile for case in found.values()] == [True, False, True, False]


def test_settings_change_the_config_and_wrong_ones_are_named():
    config = cases.system_config("meanflow", "S", 8)
    found = cases.override(config, ["model.depth=2", "model.attention=fused", "train.ema_decays=(0.9,)"])
    assert (found.model.depth, found.model.attention, found.train.ema_decays) == (2, "fused", (0.9,))
    assert config.model.depth == 12
    for wrong in ("model.nothing=1", "model.depth", "model.depth=many"):
        with pytest.raises(UserError, match=wrong):
            cases.override(config, [wrong])
    with pytest.raises(UserError, match="no config file"):
        store.load_file("configs/nothing.py")
    with pytest.raises(UserError, match="variant"):
        store.load_file("configs/digits.py:nothing")


def test_a_teacher_is_refused():
    config = cases.override(cases.system_config("decoupled", "S", 8), ["method.guidance_type=distill"])
    with pytest.raises(UserError, match="teacher"):
        cases.make_cases(config, ())


def test_remat_is_a_variant():
    assert make(variants=["remat"])["flow matching, remat"].config.train.remat
