"""What a run says at its start: where it runs, how, and what a step costs."""

from collections import Counter
from typing import NamedTuple

from absl import logging

from meanflow.commands import flops
from meanflow.config import options
from meanflow.config.stages import stage_at, stages

# Dense bfloat16 FLOP/s by a part of the device's name.  Source: NVIDIA's data sheets, SXM modules where there are any.
PEAKS = {
    "H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "B200": 2250e12,
}  # fmt: skip


class Setup(NamedTuple):
    """What a framework knows about a run."""

    hosts: list[str]  # host of each process
    num_devices: int  # in all processes
    device: str  # name of a device
    num_parameters: int
    state_bytes: dict[str, int]  # bytes on one device by part of the state
    forward_flops: float  # of one row, see `count_forward`


def report(config: options.Config, setup: Setup, step: int) -> dict[str, float]:
    """Log what a run decided, to continue from `step`.  Call in the first process.

    Returns what a step gets done, by the name of its rate: examples_per_sec, model_tflops_per_device and, if the peak
    of the device is known, mfu, the fraction of it.
    """
    config = stages(config)[stage_at(config, step)]
    of_step = flops.of_step(config, setup.forward_flops)
    logging.info("%s", "\n".join(["this run:", *lines(config, setup, of_step)]))
    per_device = of_step / setup.num_devices
    rates = {"examples_per_sec": config.train.batch_size, "model_tflops_per_device": per_device / 1e12}
    peaks = [peak for name, peak in PEAKS.items() if name in setup.device]
    return rates | ({"mfu": per_device / peaks[0]} if peaks and config.model.compute_dtype == "bfloat16" else {})


def lines(config: options.Config, setup: Setup, of_step: float) -> list[str]:
    """Return the lines of the report.  of_step: model FLOPs of a step."""
    c, m, num = config.train, config.model, setup.num_devices
    processes = Counter(setup.hosts)
    on_hosts = ", ".join(f"{host} {number}" for host, number in list(processes.items())[:4])
    more = f" and {len(processes) - 4} more" if len(processes) > 4 else ""
    attention = f"{m.attention}, {m.attention_jvp} under the JVP" if "attention_jvp" in m else "plain"
    parts = ", ".join(f"{name} {gib(size)}" for name, size in setup.state_bytes.items())
    values = {
        "hosts": f"{len(processes)}, with processes: {on_hosts}{more}",
        "devices": f"{num} x {setup.device}, {num // len(setup.hosts)} per process",
        "mesh": f"data {num // c.fsdp} x fsdp {c.fsdp}",
        "batch": f"{c.batch_size} rows, {c.batch_size // num} per device, in micro-batches: {c.accumulate}",
        "attention": attention,
        "precision": f"{m.compute_dtype}, matmul precision {c.matmul_precision}",
        "network": f"{m.name}: {setup.num_parameters / 1e6:.2f} million parameters",
        "memory": f"{gib(sum(setup.state_bytes.values()))} of state per device, without activations: {parts}",
        "step": f"{of_step:.4g} FLOPs, {flops.forwards(config):g} forwards of {setup.forward_flops:.4g} per row",
    }
    return [f"  {name:<9}  {text}" for name, text in values.items()]


def gib(size: int) -> str:
    """Return bytes in a unit to read."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
