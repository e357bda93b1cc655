"""The reader of golden fixtures: it takes names, sizes and settings from the file, and misses no result."""

import json

import numpy as np
import pytest

from meanflow.errors import UserError
from parity import check
from parity.adapters import frameworks
from parity.golden import fixtures, network, optim, sit


def test_group_of():
    groups = {
        "out/fwd/u": "fwd", "out/loss/a/u": "loss/a", "grad/a/net/x/kernel": "loss/a", "init/a.b": "init",
        "out/sample/steps1": "sample/steps1", "out/pos_embed": "pos_embed", "out/time/a/t": "time/a",
        "out/ema/jax_0.9": "ema", "out/lr/pymf": "lr/pymf",
    }  # fmt: skip
    assert {key: fixtures.group_of(key) for key in groups} == groups


def test_every_result_of_our_fixtures_is_in_a_case():
    plan = fixtures.plan(check.GOLDEN)
    assert not plan.not_covered
    for fixture, _ in plan.keys.values():
        planned = [key for other, keys in plan.keys.values() if other is fixture for key in keys]
        assert sorted(planned) == sorted(fixture.results())


def test_reads_an_npz_without_executing_it(tmp_path):
    np.savez(tmp_path / "a.npz", config=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(UserError, match="cannot read"):
        fixtures.plan(tmp_path)


@pytest.fixture
def other(tmp_path):
    """Return a directory with a fixture of another size, batch, and other case names, made by our own code."""
    with np.load(check.GOLDEN / "sit_torch.npz") as file:
        given = {key: file[key] for key in file.files}
    config = json.loads(str(given["config"]))
    config["cfg_scale"] = 2.25
    rng = np.random.RandomState(0)
    noise, y = rng.normal(size=(5, 4, 8, 8)).astype(np.float32), rng.randint(0, 10, 5)
    arrays = {key: a for key, a in given.items() if key.startswith("param/")}
    arrays |= {"in/sample/noise": noise, "in/sample/y": y}
    with frameworks.full_precision():
        fixture = fixtures.Fixture(check.GOLDEN / "sit_torch.npz")
        ours, nets = sit.nets(fixture)
        adapter, net = {name: (f, net) for name, f, net in nets}["torch"]
        for case, options in {"steps3_cfg": {"steps": 3, "cfg_scale": 2.25}, "steps8": {"steps": 8}}.items():
            ours.sample.update({"cfg_scale": 1.0} | options)
            images = adapter.sample(net, network.nhwc(noise), y, ours.sample)
            arrays[f"out/sample/{case}"] = images.transpose(0, 3, 1, 2)
        coin, drawn = rng.uniform(size=40).astype(np.float32), rng.normal(size=(40, 2)).astype(np.float32)
        ours.method.update(flow_rows="coin", flow_fraction=0.6, time_mean=(-0.1, -0.1), time_std=(1.4, 1.4))
        t, r = adapter.sample_times(net, {"times": drawn, "coin": coin}, ours.method)
    arrays |= {"in/time/time_n": drawn, "in/time/eq_u": coin, "out/time/logit_wide/t": t, "out/time/logit_wide/r": r}
    np.savez(tmp_path / "other.npz", config=np.array(json.dumps(config)), **arrays)
    return tmp_path


def test_another_fixture_of_the_same_form(other):
    result = check.run(other, "other/(sample|time)")
    assert {c.case for c in result.checks} == {
        "golden/other/sample/steps3_cfg", "golden/other/sample/steps8", "golden/other/time/logit_wide",
    }  # fmt: skip
    assert result.ok


def test_promised_cases_that_are_missing_fail(other):
    result = check.run(other, "other/(fwd|jvp)")
    assert sorted(c.quantity for c in result.checks) == [
        "cannot be checked: other has no 'in/fwd/x'",
        "cannot be checked: other has no 'in/jvp/z'",
    ]
    assert not result.ok


def test_loss_case_without_settings(tmp_path):
    with np.load(check.GOLDEN / "sit_torch.npz") as file:
        np.savez(tmp_path / "a.npz", **{key: file[key] for key in file.files}, **{"out/loss/new/u": np.ones(2)})
    result = check.run(tmp_path, "loss/new")
    assert [c.quantity for c in result.checks] == ["cannot be checked: the fixture's config has no 'new'"]


@pytest.mark.parametrize(
    ("name", "rule", "beta2", "norm"),
    [
        ("torch_adam_0999", "adam", 0.999, 0), ("torch_adamw_095_clip1", "adamw", 0.95, 1),
        ("optax_adamw_b2_095", "adamw", 0.95, 0), ("torch_adam_09_clip0.5", "adam", 0.9, 0.5),
    ],
)  # fmt: skip
def test_optimizer_settings_come_from_the_name(name, rule, beta2, norm):
    c = optim.optimizer_settings(name, np.zeros(3), np.full((2, 3), 0.002))
    assert (c.optimizer, c.beta2, c.clip_norm, c.learning_rate) == (rule, beta2, norm, 0.002)
