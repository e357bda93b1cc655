"""The JAX half: every system's step compiles for H100s that are not there, and does on them what it should."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks.rehearsal import attempts
from meanflow.config import store
from meanflow.errors import UserError

ROOT = pathlib.Path(__file__).parents[3]
PROGRAM = ROOT / "tests/helpers/compile_for_card.py"
DEPTH = 2  # blocks of the transformer that is compiled


def compile_for_card(*cases):
    """Return what the program finds of each case, see compile_for_card.py."""
    done = subprocess.run(
        [sys.executable, PROGRAM, *cases], capture_output=True, text=True, check=False,
        env=os.environ | attempts.environment("jax"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [
        ("dit,meanflow,plain,1,1,1", "dit,meanflow,fused,1,8,1"),
        ("imf_dit,improved,plain,1,1,1", "imf_dit,improved,fused,1,8,1"),
        ("dmf_dit,decoupled,plain,1,1,1", "dmf_dit,decoupled,fused,1,8,1"),
        ("edm2,rectified,plain,1,1,1", "edm2,rectified,plain,1,8,1"),
        ("unet,meanflow,plain,1,1,1", "unet,meanflow,plain,1,8,1"),
    ],
    ids=lambda cases: cases[0].split(",")[1] + "_" + cases[0].split(",")[0],
)
def test_every_system_compiles_for_a_gpu(cases):
    one, eight = compile_for_card(*cases)
    assert not one["collectives"] and set(eight["collectives"]) == {"all-reduce"}
    kernels = ["__cudnn$fmhaSoftmax" in found["custom_calls"] for found in (one, eight)]
    assert kernels == [False, "fused" in cases[1]]
    assert any("cublas" in target for target in one["custom_calls"])


@pytest.mark.slow
def test_gradients_move_while_the_backward_pass_goes_on_and_its_mutations_are_seen():
    """On two hosts; then, sharded, each block's gradient is scattered; then with what it guards against."""
    cases = ["2,4,1", "1,8,8", "1,8,1,not_in_turn", "1,8,1,default_backend"]
    hosts, sharded, at_once, elsewhere = compile_for_card(*(f"dit,meanflow,fused,{case}" for case in cases))
    assert hosts["during"] >= DEPTH and hosts["collectives"]["all-reduce"]["count"] > DEPTH
    assert sharded["during"] >= DEPTH and sharded["collectives"]["reduce-scatter"]["count"] > DEPTH
    assert sharded["collectives"]["all-reduce"]["bytes"] < 0.05 * hosts["collectives"]["all-reduce"]["bytes"]
    assert at_once["during"] < DEPTH and at_once["collectives"]["all-reduce"]["count"] <= DEPTH
    assert "__cudnn$fmhaSoftmax" in hosts["custom_calls"] and "__cudnn$fmhaSoftmax" not in elsewhere["custom_calls"]


@pytest.mark.slow
def test_a_rehearsal_adds_up(tmp_path):
    import tiny

    config = tiny.make(changes={"model.compute_dtype": "bfloat16", "train.batch_size": 32})
    found = attempts.rehearse("jax", config, "h100", 1, 1)
    assert sum(found["parts"].values()) == found["peak_bytes"] and min(found["parts"].values()) >= 0
    params = found["parts"]["parameters"]
    assert found["parts"]["optimizer"] == pytest.approx(2 * params, rel=0.01)
    assert found["parts"]["ema"] == 2 * params and found["flops"] > found["forward_flops"] > 0
    assert found["largest"][0]["where"].startswith("jax_impl/")


def test_without_the_compiler_jax_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(attempts, "APART", tmp_path / "none")
    with pytest.raises(UserError, match=r"compiler for NVIDIA GPUs is missing: make install, or pip install"):
        attempts.rehearse("jax", store.load_file("configs/digits.py"), "h100", 1, 1)
