"""Measures a table of cases.  Each step runs between two flow-matching steps, so ratios are of paired runs."""

import importlib
import itertools
import statistics
import time

from tqdm import tqdm

from benchmarks import cases, memory

MATMUL = "matmul"  # timed like a step, because machine speed may drift during a measurement
WARM_UP = 2  # unmeasured steps per case before the measured ones
FIRST = 3  # unmeasured steps on several devices, whose metrics are reported


def measure(framework, table, runs, memory_of=None):
    """Return one row per case, a dictionary from `figures`.

    table: cases that share one batch size.  runs: number of paired runs.  memory_of: {case: bytes by name} if already
    measured; if None, memory is measured in this process.
    """
    steps = importlib.import_module(f"benchmarks.{framework}_steps")
    steps.start(table[0].config)
    counted = {case.name: steps.count_step(case.config, cases.make_batch(case.config)) for case in tqdm(table, "FLOPs")}
    first = table[0].config
    forward = steps.count_forward(first, cases.make_batch(first))
    built = {}
    for case in tqdm(table, "compiling"):
        built[case.name] = warm(steps.Step(case.config, cases.make_batch(case.config)))
    matmul = warm(steps.Matmul(first))
    bytes_of = memory_of or {name: step.memory() for name, step in built.items()}
    times, around = take_turns(built | {MATMUL: matmul}, runs)
    ratios = {name: paired(times[name], around[name]) for name in times}
    shared = {
        "framework": framework, "device": steps.device()[1], "forward_flops": forward,
        "matmul_flops_per_s": matmul.flops / statistics.median(times[MATMUL]),
        "flow_matching_of_matmul_rate": 3 * forward / matmul.flops * ratios[MATMUL],
    }  # fmt: skip
    rows = [figures(case, times, ratios, counted, shared) | bytes_of[case.name] for case in table]
    compare(table, rows, times)
    return rows


def warm(step):
    """Return the step after warm-up runs, the first of which may compile it."""
    for _ in range(WARM_UP):
        step.run()
    return step


def take_turns(built, runs):
    """Return {name: seconds of each run} and {name: mean seconds of the flow-matching steps before and after}.

    Each run takes every step once, each between two flow-matching steps, so that changes in machine speed affect both.
    Flow matching is paired with itself.
    """
    times, around = {name: [] for name in built}, {name: [] for name in built}
    others = dict(built)
    flow_matching = others.pop(cases.FLOW_MATCHING)
    for _ in tqdm(range(runs), "measuring"):
        before = seconds(flow_matching)
        times[cases.FLOW_MATCHING].append(before)
        around[cases.FLOW_MATCHING].append(before)
        for name, step in others.items():
            times[name].append(seconds(step))
            after = seconds(flow_matching)
            around[name].append((before + after) / 2)
            before = after
    return times, around


def seconds(step):
    """Return the time of one step."""
    began = time.perf_counter()
    step.run()
    return time.perf_counter() - began


def figures(case, times, ratios, counted, shared):
    """Return the figures of a case by name, including those that all cases share.

    ratio: median time relative to the surrounding flow-matching steps.  limit: ratio of forwards.
    ratio_at_matmul_rate: the ratio if all work beyond the measured flow-matching step ran at the speed of a large
    matmul.  counted_ratio: ratio of counted FLOPs.  formula_flops: the limit times the 3F of flow matching.  Achieved
    FLOP/s and their fraction of the matmul rate (from paired runs) use formula_flops, so redundant work does not count.
    """
    median, config, ratio = statistics.median(times[case.name]), case.config, ratios[case.name]
    counted_ratio = counted[case.name] / counted[cases.FLOW_MATCHING]
    formula, share = 3 * shared["forward_flops"] * case.limit, shared["flow_matching_of_matmul_rate"]
    return shared | {
        "case": case.name, "variant": case.variant, "batch": config.train.batch_size,
        "tokens": cases.num_tokens(config), "dtype": config.model.compute_dtype, "median_s": median,
        "examples_per_s": config.train.batch_size / median, "ratio": ratio, "limit": case.limit,
        "ratio_over_limit": ratio / case.limit, "ratio_at_matmul_rate": 1 + (case.limit - 1) * share,
        "counted_flops": counted[case.name], "counted_ratio": counted_ratio,
        "counted_off_limit": counted_ratio / case.limit - 1, "formula_flops": formula,
        "flops_per_s": formula / median, "share_of_matmul_rate": share * case.limit / ratio,
    }  # fmt: skip


def paired(times, others):
    """Return the median of the paired ratios of two steps."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def compare(table, rows, times):
    """Add to the rows how variants compare with their cases in time and peak memory."""
    by_name = {row["case"]: row for row in rows}
    for case, row in zip(table, rows, strict=True):
        if case.variant == "eager":
            by_name[case.of]["compiled_over_eager"] = paired(times[case.of], times[case.name])
        if case.variant == "remat":
            row["time_over_plain"] = paired(times[case.name], times[case.of])
            peaks = row.get("peak_bytes"), by_name[case.of].get("peak_bytes")
            row["memory_over_plain"] = peaks[0] / peaks[1] if all(peaks) else None


def sweep(framework, points, runs, own_process=False):
    """Return the rows for every table of cases in `points`, in order.

    own_process: measure the memory of each case in a separate process, before this one reserves GPU memory.
    """
    memories = [
        {case.name: memory.of_step(framework, case.config) for case in tqdm(table, "memory")} if own_process else None
        for table in points
    ]
    measured = (measure(framework, table, runs, found) for table, found in zip(points, memories, strict=True))
    return list(itertools.chain.from_iterable(measured))
