"""The JAX half of a rehearsal: `python -m benchmarks.rehearsal.jax_step CONFIG.json CARD DEVICES NODES`.

XLA compiles the trainer's own step for a card that is not there, and plans its memory.  Prints one JSON object; see
`rehearse`.  A program of its own, because JAX reads the environment once: start it with `attempts.environment`.
"""

import contextlib
import copy
import json
import math
import pathlib
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn  # which asks the library for its version
from jax.experimental import topologies
from jax.sharding import NamedSharding

from benchmarks import cases, jax_steps
from benchmarks.rehearsal import buffers, cards
from jax_impl import devices, step
from jax_impl.flops import count_forward
from meanflow.config import checks, store
from meanflow.errors import UserError, exit_on_user_error

CUDNN = 9, 10, 2  # the version to compile for
OPTIONS = {  # without a card to try kernels on
    "xla_gpu_enable_triton_gemm": False,  # XLA would choose tiles blindly, and finds none for some products
    "xla_backend_optimization_level": 0,  # nobody runs the program; its plan of memory is the same
}
ASSUMED = (
    "products run in cuBLAS, as XLA chooses for most large ones when it can try both on the card (without one, its "
    "Triton tiles are guesses, and some products find none)",
    f"cuDNN {'.'.join(map(str, CUDNN))}; kernels of attention and convolutions need what workspace XLA plans without "
    "having tried them",
    "gradients are counted at their full size, because clipping and their norm need all of them; temporaries are the "
    "rest of what XLA plans",
)
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads} fpus_per_core: {fpus}
  shared_memory_per_block: 49152 shared_memory_per_core: {card.shared_memory}
  shared_memory_per_block_optin: {optin} core_count: {card.cores} clock_rate_ghz: {card.clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {card.l2_cache} device_memory_size: {card.memory}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {card.capability[0]} minor: {card.capability[1]} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {dnn[0]} minor: {dnn[1]} patch: {dnn[2]} }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{card.title}"
"""


def describe(card: cards.Card, num_devices: int, num_nodes: int) -> list:
    """Return the devices of `num_nodes` hosts with `num_devices` cards each, which can be compiled for.

    Raises UserError if JAX's compiler for GPUs is not installed.
    """
    hopper = card.capability >= (9, 0)
    text = TARGET.format(
        card=card, dnn=CUDNN, bandwidth=int(card.bandwidth), optin=card.shared_memory - 1024,
        threads=2048 if hopper or card.capability == (8, 0) else 1536, fpus=64 if card.capability == (8, 0) else 128,
    )  # fmt: skip
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=text, topology=f"1x{num_nodes}x{num_devices}"
        )
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            "JAX's compiler for NVIDIA GPUs is missing: make install, or pip install '.[rehearse]' "
            f"({str(error).splitlines()[0]})"
        ) from error
    return topology.devices


def compile_step(config, found: list, options: dict | None = None) -> tuple[Any, Any, Any, Any]:
    """Compile the training step of a config for described devices; returns (compiled, state, batch, lowered).

    state, batch: shapes, dtypes and shardings.  Raises UserError for a mesh or a batch that does not divide.
    """
    checks.check_divisible(config, len(found), "devices")
    mesh = devices.device_mesh(found, config.train.fsdp)
    graphdef, state = step.abstract_state(config, mesh)
    sharding = NamedSharding(mesh, step.BATCH)
    batch = {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for name, a in cases.make_batch(config).items()
    }
    train_step: Any = step.make_train_step(config, graphdef, mesh)
    with cudnn_to_compile_for():
        lowered = train_step.trace(state, batch).lower(lowering_platforms=("cuda",))
    return lowered.compile(compiler_options=OPTIONS | (options or {})), state, batch, lowered


@contextlib.contextmanager
def cudnn_to_compile_for() -> Iterator[None]:
    """Let JAX find the version of cuDNN that is compiled for, where the library itself is missing."""
    before = cudnn.check_cudnn_version
    major, minor, patch = CUDNN
    cudnn.check_cudnn_version = lambda: major * 10_000 + minor * 100 + patch
    try:
        yield
    finally:
        cudnn.check_cudnn_version = before


def rehearse(config, card: cards.Card, num_devices: int, num_nodes: int) -> dict:
    """Return what a step needs on one card, of `num_nodes` hosts with `num_devices` each.

    parts: bytes by name; they add up to peak_bytes.  collectives: {kind: {"count", "bytes"}}.  custom_calls:
    {target: count}.  largest: [{"bytes", "count", "shape", "where"}] at the moment of the peak.  flops: counted in a
    step, on one card; forward_flops: in one forward F of a row.  assumed: sentences.  seconds: it took.
    """
    began = time.perf_counter()
    devices.set_precision(config)
    with tempfile.TemporaryDirectory() as dump:
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_proto": True, "xla_dump_hlo_module_re": ".*train_step.*"}
        compiled, state, batch, _ = compile_step(config, describe(card, num_devices, num_nodes), options)
        largest = largest_buffers(dump)
    program, plan = compiled.as_text(), compiled.memory_analysis()
    peak = plan.argument_size_in_bytes + plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    parts = {
        "parameters": size(state.params), "optimizer": size(state.opt_state), "ema": size(state.emas),
        "gradients": size(state.params), "batch": size(batch),
    }  # fmt: skip
    parts["temporaries"] = peak - sum(parts.values())
    counted = jax_steps.count_step(on_one_device(config), cases.make_batch(config))
    return {
        "parts": parts, "peak_bytes": peak, "peak_kind": "planned by XLA",
        "collectives": {kind: dict(found) for kind, found in jax_steps.collectives(program).items()},
        "custom_calls": dict(Counter(re.findall(r'custom_call_target="([^"]*)"', program)).most_common()),
        "largest": largest, "flops": counted / (num_devices * num_nodes), "forward_flops": count_forward(config),
        "assumed": list(ASSUMED), "seconds": time.perf_counter() - began,
    }  # fmt: skip


def on_one_device(config):
    """Return the config for a single device."""
    config = copy.deepcopy(config)
    config.train.fsdp = 1
    return config


def size(arrays) -> int:
    """Return the bytes of a device's shards."""
    return sum(a.dtype.itemsize * math.prod(a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(arrays))


def largest_buffers(dump: str) -> list[dict]:
    """Return the largest groups of equal temporaries that are alive at the peak, from a dump of XLA.

    Equal in shape and in the line of ours that makes them.
    """
    from tensorflow.compiler.xla.service import hlo_pb2  # pyright: ignore

    [path] = pathlib.Path(dump).glob("*gpu_after_optimizations.hlo.pb")
    program = hlo_pb2.HloProto.FromString(path.read_bytes())  # pyright: ignore
    instructions = {i.id: i for c in program.hlo_module.computations for i in c.instructions}
    made = {buffer.id: buffer for buffer in program.buffer_assignment.logical_buffers}
    found = []
    for buffer in at_peak(program.buffer_assignment):
        defined = made[buffer].defined_at
        instruction = instructions[defined.instruction_id]
        shape = instruction.shape
        for index in defined.shape_index:
            shape = shape.tuple_shapes[index]
        calls = stack(instruction.metadata, program.hlo_module.stack_frame_index)
        where = buffers.line_of_ours(calls) or instruction.metadata.op_name or "XLA"
        found.append((made[buffer].size, shape_text(shape), where))
    return buffers.largest(found)


def at_peak(assignment) -> set[int]:
    """Return the ids of the temporaries alive when they take most memory, by replaying XLA's trace of its heap."""
    arena = max(assignment.buffer_allocations, key=lambda a: 0 if a.is_entry_computation_parameter else a.size)
    sizes, alive, now, most, found = {a.logical_buffer_id: a.size for a in arena.assigned}, set(), 0, -1, set()
    for event in (event for trace in assignment.heap_simulator_traces for event in trace.events):
        if event.buffer_id not in sizes:
            continue
        if event.kind == event.ALLOC:
            alive.add(event.buffer_id)
            now += sizes[event.buffer_id]
        elif event.kind == event.FREE and event.buffer_id in alive:
            alive.remove(event.buffer_id)
            now -= sizes[event.buffer_id]
        if now > most:
            most, found = now, set(alive)
    return found


def shape_text(shape) -> str:
    """Return a shape of XLA as text, such as bf16[32,256,768]."""
    from tensorflow.compiler.xla import xla_data_pb2  # pyright: ignore

    name = xla_data_pb2.PrimitiveType.Name(shape.element_type)  # pyright: ignore
    return f"{name.lower()}[{','.join(map(str, shape.dimensions))}]"


def stack(metadata, frames) -> Iterator[tuple[str, int, str]]:
    """Yield (path, line, function) of the calls that made an instruction, the innermost first."""
    frame = metadata.stack_frame_id
    while frame:  # counted from 1
        place = frames.stack_frames[frame - 1]
        location = frames.file_locations[place.file_location_id - 1]
        yield (
            frames.file_names[location.file_name_id - 1], location.line,
            frames.function_names[location.function_name_id - 1],
        )  # fmt: skip
        frame = place.parent_frame_id


def main(path: str, card: str, num_devices: str, num_nodes: str) -> None:
    """Rehearse the config in a file, and print the figures."""
    config = checks.check(store.from_json(pathlib.Path(path).read_text()))
    print(json.dumps(rehearse(config, cards.find(card), int(num_devices), int(num_nodes))))


if __name__ == "__main__":
    with exit_on_user_error():
        main(*sys.argv[1:])
