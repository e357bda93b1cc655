"""Names buffers by the lines of ours that make them."""

from collections import defaultdict
from collections.abc import Iterable

TOP = 10  # groups to name
ROOTS = ("jax_impl/", "torch_impl/", "meanflow/")
CALLED_BY_ALL = ("models/layers.py", "models/tape.py")


def largest(buffers: Iterable[tuple[int, str, str]]) -> list[dict]:
    """Return the largest groups of (bytes, shape, line) that are alike, as [{"bytes", "count", "shape", "where"}]."""
    groups = defaultdict(lambda: {"bytes": 0, "count": 0})
    for size, shape, where in buffers:
        groups[shape, where]["bytes"] += size
        groups[shape, where]["count"] += 1
    rows = [found | {"shape": shape, "where": where} for (shape, where), found in groups.items()]
    return sorted(rows, key=lambda row: -row["bytes"])[:TOP]


def line_of_ours(stack: Iterable[tuple[str, int, str]]) -> str | None:
    """Return the innermost line of ours in a stack of (path, line, function), as `file:line (function)`.

    A line of layers that everything calls only if there is no other; None if none is ours.  The innermost comes first.
    """
    found = None
    for path, line, function in stack:
        root = next((root for root in ROOTS if f"/{root}" in path), None)
        if root is None:
            continue
        path = root + path.rpartition(f"/{root}")[2]
        text = f"{path}:{line} ({function.split('.<locals>')[0]})"
        if not path.endswith(CALLED_BY_ALL):
            return text
        found = found or text
    return found
