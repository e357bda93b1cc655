"""Checks that both implementations are the same mathematics, and agree with the official code.

    python parity/check.py [--golden DIR] [--only REGEX] [--jobs N] [--gpu] [--json FILE] [--report FILE.html]

float64: both implementations with the same weights and draws, and each against a second derivation.
float32, bfloat16: each implementation's error against float64.
golden: both against recorded outputs of the official repositories.
Exit code 0 if every check passes, 1 if one fails, 2 for a usage error.

Compilation takes most of the time.  To keep compiled programs for the next run, set JAX_COMPILATION_CACHE_DIR=DIR and
JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from meanflow.config import paths
from meanflow.errors import UserError, exit_on_user_error
from parity import workers
from parity.adapters import frameworks, frozen_networks
from parity.cases import extremes, objectives, precision
from parity.checks import Case, Check, Measure
from parity.golden import fixtures as golden

GOLDEN = pathlib.Path(__file__).parent / "golden"
FORGET_EVERY = 32  # cases between drops of compiled programs: neighbours share some, but a process cannot hold all
MEMORY = 4 * 2**30  # bytes per process
# Halves compilation, which takes most of the time; the mathematics is the same.
XLA_FLAGS = "--xla_cpu_use_fusion_emitters=false"


class Result(NamedTuple):
    """Result of a run."""

    checks: list[Check]
    not_covered: list[str]  # golden files and keys that no check read
    strict: bool  # whether not_covered counts as a failure

    @property
    def ok(self) -> bool:
        """Whether every check passes and everything that must be covered is."""
        return all(check.ok for check in self.checks) and not (self.strict and self.not_covered)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code.  Raises UserError for usage errors."""
    args = parse(argv)
    if args.gpu:
        frameworks.check_gpu()
    result = run(args.golden, args.only, args.jobs, "gpu" if args.gpu else "cpu")
    print_table(result)
    if args.json:
        write(args.json, json.dumps([as_json(check) for check in result.checks], indent=2, allow_nan=False) + "\n")
    if args.report:
        from parity import report  # matplotlib is slow to import

        write(args.report, report.html(result.checks, result.not_covered))
    return 0 if result.ok else 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--golden", metavar="DIR", type=paths.read,
        help="directory of golden fixtures, *.npz (default: parity/golden); if given, files of unknown systems and "
        "results that no check reads are failures",
    )  # fmt: skip
    parser.add_argument(
        "--only", metavar="REGEX",
        help="run only cases whose name matches, e.g. float64/split, golden/sit_torch/loss",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", metavar="N", type=positive, default=default_jobs(),
        help="worker processes; 1 runs every case in this process (default: one per usable core, with at least "
        f"{MEMORY / 2**30:.0f} GiB of memory each; here %(default)s)",
    )  # fmt: skip
    parser.add_argument("--gpu", action="store_true", help="run both frameworks on the GPU")
    parser.add_argument(
        "--json", metavar="FILE", type=paths.written,
        help="write the checks to FILE: a list of {case, framework, quantity, error, bound, ok}; framework is jax, "
        "torch or jax-torch; non-finite errors are null",
    )  # fmt: skip
    parser.add_argument(
        "--report", metavar="FILE.html", type=paths.written, help="write a page with a table, plots and samples to FILE"
    )
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """Return a positive integer.  Raises ValueError."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def default_jobs() -> int:
    """Return how many processes the cores and the memory of the machine allow."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(cores, memory // MEMORY))


def run(
    golden_directory: pathlib.Path | None = None, only: str | None = None, jobs: int = 1, platform: str = "cpu"
) -> Result:
    """Run the cases whose name matches `only` (all if None), in this process or, if jobs > 1, in that many workers.

    Raises UserError if nothing matches, `only` is not a regular expression, a fixture cannot be read or a worker is
    killed.
    """
    try:
        pattern = re.compile(only or "")
    except re.error as error:
        raise UserError(f"--only {only!r} is not a regular expression: {error}") from error
    fixtures = golden.plan(golden_directory or GOLDEN)
    selected = [case for case in every_case(fixtures) if pattern.search(case.name)]
    not_covered = [name for name in fixtures.not_covered if pattern.search(name)]
    if not selected and not not_covered:
        raise UserError(f"no case matches --only {only!r}; names begin with float64/, float32/, bfloat16/ or golden/")
    groups: dict[str, list[str]] = {}
    for case in selected:
        groups.setdefault(case.network, []).append(case.name)
    if jobs > 1 and len(groups) > 1:
        results = workers.run(groups, min(jobs, len(selected)), in_worker, golden_directory or GOLDEN, platform)
    else:
        results = in_this_process(groups, fixtures, platform)
    found = {}
    for done in results:
        found[done.name] = done.result
        print(f"[{len(found)}/{len(selected)}] {done.name} {done.seconds:.1f} s", file=sys.stderr, flush=True)
    checks = [check for case in selected for check in found[case.name][0]]
    not_covered += [name for case in selected for name in found[case.name][1]]
    return Result(checks, not_covered, strict=bool(golden_directory or only))


def every_case(fixtures: golden.Plan) -> list[Case]:
    """Return all cases, in the order of the table."""
    own = [case for module in (objectives, extremes, precision, frozen_networks) for case in module.all_cases()]
    return own + fixtures.cases


def in_this_process(groups: dict[str, list[str]], fixtures: golden.Plan, platform: str) -> Iterator[workers.Done]:
    """Run cases network by network, which share compiled programs."""
    with frameworks.full_precision(platform):
        run_one = runner(fixtures)
        for name in itertools.chain(*groups.values()):
            began = time.perf_counter()
            yield workers.Done(name, run_one(name), time.perf_counter() - began)


@contextlib.contextmanager
def in_worker(directory: pathlib.Path, platform: str) -> Iterator[Callable]:
    """Set up a worker process."""
    with frameworks.full_precision(platform):
        yield runner(golden.plan(directory))


def runner(fixtures: golden.Plan) -> Callable[[str], tuple[list[Check], list[str]]]:
    """Return a function that runs a case by name and returns its checks and the golden results it did not read."""
    cases, count = {case.name: case for case in every_case(fixtures)}, itertools.count(1)

    def run_one(name):
        checks, unread = run_case(cases[name]), []
        if name in fixtures.keys and all(check.error < math.inf for check in checks):
            fixture, keys = fixtures.keys[name]
            unread = [f"golden/{fixture.name}/{key}" for key in keys if key not in fixture.used]
        if next(count) % FORGET_EVERY == 0:
            frameworks.forget()
        return checks, unread

    return run_one


def run_case(case: Case) -> list[Check]:
    """Return the checks of one case; a fixture that is incomplete or does not fit is a failed check."""
    measure = Measure(case.name)
    try:
        case.run(measure)
    except UserError as error:
        measure.add("jax-torch", f"cannot be checked: {error}", math.inf, 0.0)
    if not measure.checks:
        measure.add("jax-torch", "the case measured nothing", math.inf, 0.0)
    return measure.checks


def print_table(result: Result) -> None:
    """Print all checks by system, uncovered results, and a summary."""
    section = None
    for check in result.checks:
        if section != (section := "/".join(check.case.split("/")[: 2 if check.case.startswith("golden") else 1])):
            print(f"\n{section}\n{'case':36} {'framework':9} {'error':>9} {'bound':>9}  verdict  quantity")
        verdict = "ok" if check.ok else "FAILED"
        figures = f"{check.error:9.1e} {check.bound:9.1e}"
        print(f"{check.case:36} {check.framework:9} {figures}  {verdict:7}  {check.quantity}")
    print()
    for name in result.not_covered:
        print(f"not covered: {name}")
    failed = [check for check in result.checks if not check.ok]
    for check in failed:
        print(f"FAILED: {check.case} {check.framework} {check.quantity}: {check.error:.3g} > {check.bound:.3g}")
    print(summary(result, len(failed)))


def summary(result: Result, num_failed: int) -> str:
    """Return one line: the counts and the check with the largest error/bound."""
    text = f"{len(result.checks)} checks, {num_failed} failed, {len(result.not_covered)} not covered"
    if not result.checks:
        return text
    worst = max(result.checks, key=lambda check: check.ratio)
    return f"{text}; worst error/bound {worst.ratio:.2g}: {worst.case} {worst.framework} {worst.quantity}"


def as_json(check: Check) -> dict:
    """Return a check as JSON values."""
    error = check.error if math.isfinite(check.error) else None
    return {
        "case": check.case, "framework": check.framework, "quantity": check.quantity, "error": error,
        "bound": check.bound, "ok": check.ok,
    }  # fmt: skip


def write(path: str, text: str) -> None:
    """Write a text file.  Raises UserError if it cannot be written."""
    try:
        pathlib.Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = (
        f"{XLA_FLAGS} {os.environ.get('XLA_FLAGS', '')}"  # read when JAX compiles for the first time
    )
    try:
        with exit_on_user_error():
            sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
