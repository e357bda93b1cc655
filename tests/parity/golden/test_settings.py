"""Settings and draws of the official codes that no public fixture has, and how the readers of fixtures take them."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from meanflow.errors import UserError
from parity import check
from parity.checks import Measure
from parity.golden import dit, dmf, edm2, fixtures, imf, network, sit, unet

GUIDED = {
    "P_mean": -0.4, "P_std": 1.0, "data_proportion": 0.5, "class_dropout_prob": 0.1, "guidance_eq": "cfg", "omega": 2.0,
    "kappa": 0.5, "t_start": 0.0, "t_end": 1.0, "norm_p": 1.0, "norm_eps": 0.01,
}  # fmt: skip


def fixture(name, tmp_path, config=None, **arrays):
    """Return a public fixture with another config, {section: {setting: value}}, and other arrays by key."""
    with np.load(check.GOLDEN / f"{name}.npz") as file:
        found = {key: file[key] for key in file.files}
    settings = json.loads(str(found["config"]))
    for section, changes in (config or {}).items():
        settings[section].update(changes)
    everything: dict[str, Any] = found | arrays | {"config": json.dumps(settings)}
    np.savez(tmp_path / f"{name}.npz", **everything)
    return fixtures.Fixture(tmp_path / f"{name}.npz")


def test_uniform_times_go_beyond_80_81(tmp_path, capsys):
    """As the official code has them: t = u1, r = t u2, r = t where the coin says so, in float32."""
    rng = np.random.RandomState(0)
    first, second, coin = (rng.uniform(size=48).astype(np.float32) for _ in range(3))
    first[:3], coin[:2] = (0.9999, 0.995, 80 / 81), (0.99, 0.01)
    r = np.where(coin < 1 - 0.6, first, first * second)
    arrays = {"in/time/u1": first, "in/time/u2": second, "in/time/mask_u": coin}
    fixture("remeanflow_edm2_torch", tmp_path, **arrays, **{"out/time/uniform/t": first, "out/time/uniform/r": r})
    assert check.main(["--golden", str(tmp_path), "--only", "time/uniform$"]) == 0
    assert "4 checks, 0 failed" in capsys.readouterr().out


def test_a_loss_of_re_meanflow_with_uniform_times(tmp_path):
    draws = {"in/loss/u1": np.array([0.1, 0.5, 0.99, 0.3]), "in/loss/u2": np.array([0.2, 0.4, 0.6, 0.8])}
    given = fixture("remeanflow_edm2_torch", tmp_path, {"mf": {"t_r_schedule": "uniform"}}, **draws)
    found, _ = edm2.loss_draws(given, given.config["cases"]["guid"])
    assert edm2.method_of(given)["time_sampler"] == "uniform"
    np.testing.assert_array_equal(found["times"], draws["in/loss/u1"])
    np.testing.assert_array_equal(found["second"], draws["in/loss/u2"])
    assert edm2.method_of(given, fixtures.Settings(p_mean=3.0))["interval_mean"] == 3.0


@pytest.mark.parametrize(
    ("changes", "guidance"),
    [({}, True), ({"kappa": 0.0}, True), ({"kappa": -0.1}, False), ({"guidance_eq": "none"}, False)],
)
def test_official_meanflow_guides_only_by_cfg_and_no_negative_kappa(changes, guidance):
    assert dit.method_of(fixtures.Settings(GUIDED | changes))["guidance"] == guidance


def test_official_meanflow_with_uniform_times(tmp_path):
    uniforms = {f"in/loss/u_{key}": np.linspace(0, 0.9, 8, dtype=np.float32) for key in ("t", "r")}
    given = fixture("meanflow_dit_flax", tmp_path, {"base": {"noise_dist": "uniform"}}, **uniforms)
    method = dit.method_of(given.config["base"] | given.config["cases"]["noguid"])
    assert method["time_sampler"] == "uniform"
    times = dit.drawn(given, "loss", SimpleNamespace(**method))
    np.testing.assert_array_equal(times[:, 0], uniforms["in/loss/u_t"])


def test_a_case_overrides_what_all_cases_share(tmp_path):
    given = fixture("imf_dit_flax", tmp_path)
    options = imf.method_of(given, given.config["cases"]["cfg_beta2"] | {"P_mean": 0.8, "data_proportion": 0.25})
    assert options["time_mean"] == (0.8, 0.8) and options["flow_fraction"] == 0.25
    with pytest.raises(fixtures.MissingKey, match="no 'cfg_gamma'"):
        (given.config["base"] | given.config["cases"])["cfg_gamma"]


def test_official_samplers_do_not_guide_below_a_scale_of_1(tmp_path, monkeypatch):
    given, scales = fixture("dmf_dmft_torch", tmp_path, {"cfg": {"cfg_scale": 0.5}}), []

    def sample(net, noise, y, c, fresh):
        scales.append(c.cfg_scale)
        return noise

    config = dmf.config_of(given.config["net"])
    monkeypatch.setattr(dmf, "nets", lambda fixture: (config, [("jax", SimpleNamespace(sample=sample), None)]))
    dmf.sample(given, "euler_n4_s1.5_cfg", Measure("case"))
    assert scales == [1.0]


@pytest.mark.parametrize(
    ("name", "section", "changes", "message"),
    [
        ("remeanflow_edm2_torch", "net", {"clip_act": 128}, "clip_act = 128, but ours has only 256"),
        ("remeanflow_edm2_torch", "net", {"dropout": 0.1}, "dropout = 0.1, but ours has only 0.0"),
        ("meanflow_unet_torch", "net", {"dropout": 0.2}, "dropout = 0.2"),
        ("sit_cifar_unet_torch", "net", {"embedding_type": "fourier"}, "embedding_type = 'fourier'"),
        ("sit_torch", "net", {"qk_norm": True}, "qk_norm = True"),
    ],
)
def test_settings_that_ours_has_not_are_named(name, section, changes, message, tmp_path):
    given = fixture(name, tmp_path, {section: changes})
    with pytest.raises(UserError, match=message):
        {"sit_torch": sit.nets}.get(name, config_of)(given)


def config_of(given):
    """Build our config of a fixture's network."""
    if given.system == "remeanflow_edm2_torch":
        return edm2.config_of(given.config["net"], True)
    return unet.config_of(given)


def test_expect_takes_what_is_absent_for_given():
    network.expect({}, dropout=0.0)
    network.expect({"dropout": 0}, dropout=0.0)
