"""What a run says at its start, and the rates that follow from it."""

import pytest

from meanflow.commands import logs, startup
from meanflow.config import store

GIB = 2**30


@pytest.fixture
def config():
    config = store.load_file("configs/meanflow_imagenet.py:xl2")
    config.update_from_flattened_dict(
        {"train.batch_size": 256, "train.fsdp": 8, "model.attention": "fused", "model.compute_dtype": "bfloat16"}
    )
    return config


def setup(device="NVIDIA H100 80GB HBM3"):
    sizes = {"parameters": GIB, "optimizer": 2 * GIB, "EMA": GIB, "gradients": GIB}
    return startup.Setup(["a"] * 8 + ["b"] * 8, 16, device, 676_000_000, sizes, 237e9)


def test_the_report(config):
    of_step = 4.5 * 237e9 * 256
    assert startup.lines(config, setup(), of_step) == [
        "  hosts      2, with processes: a 8, b 8",
        "  devices    16 x NVIDIA H100 80GB HBM3, 1 per process",
        "  mesh       data 2 x fsdp 8",
        "  batch      256 rows, 16 per device, in micro-batches: 1",
        "  attention  fused, plain under the JVP",
        "  precision  bfloat16, matmul precision highest",
        "  network    dit: 676.00 million parameters",
        "  memory     5.00 GiB of state per device, without activations: parameters 1.00 GiB, optimizer 2.00 GiB, "
        "EMA 1.00 GiB, gradients 1.00 GiB",
        "  step       2.73e+14 FLOPs, 4.5 forwards of 2.37e+11 per row",
    ]


def test_utilisation_is_known_for_known_cards_in_bfloat16(config):
    rates = startup.report(config, setup(), 0)
    per_device = 4.5 * 237e9 * 16
    assert rates == pytest.approx(
        {"examples_per_sec": 256, "model_tflops_per_device": per_device / 1e12, "mfu": per_device / 989e12}
    )
    assert "mfu" not in startup.report(config, setup("NVIDIA H100 PCIe"), 0)
    config.model.compute_dtype = "float32"
    assert "mfu" not in startup.report(config, setup(), 0)


def test_a_guided_stage_needs_more_forwards():
    config = store.load_file("configs/digits.py:remeanflow")
    config.update_from_flattened_dict({"method.stage1_steps": 10, "method.stage_order": "plain_first"})
    plain, guided = (startup.report(config, setup(), step)["model_tflops_per_device"] for step in (9, 10))
    p = 1 - config.method.flow_fraction
    assert guided / plain == pytest.approx((4 + 2 * p) / (3 + p))


def test_rates_go_to_tensorboard_and_not_to_the_log_that_resumes(tmp_path):
    log = logs.MetricLog(tmp_path)
    written = {}
    log.tensorboard.write_scalars = lambda step, scalars: written.update(scalars)
    progress = logs.Progress(2, log, {"examples_per_sec": 64, "mfu": 0.5})
    progress(1)
    progress(2)
    assert written["examples_per_sec"] == pytest.approx(64 * written["steps_per_sec"])
    assert written["mfu"] == pytest.approx(written["steps_per_sec"] / 2)
    assert "uptime" in written and not (tmp_path / "metrics.jsonl").exists()
    log.close()
