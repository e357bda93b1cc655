"""The processes of one command, and what is gathered from them."""

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class ProcessGroup(NamedTuple):
    """One process among those of a command."""

    process: int = 0
    num_processes: int = 1
    gather: Callable[[bytes], list[bytes]] = lambda part: [part]  # of each process's bytes those of all, to the first
    together: bool = False  # the processes make every batch together, and each has all its rows; else batches in turn


ALONE = ProcessGroup()


def gather_rows(parts: list[dict[str, np.ndarray]], group: ProcessGroup) -> dict[str, np.ndarray]:
    """Return the rows {name: [n ...]} of all processes, in the order of their `indices`; nothing but in the first one.

    Every process calls it.  parts: the batches of this process, with the same names; there may be none.
    """
    own = {key: np.concatenate([part[key] for part in parts]) for key in (parts[0] if parts else ())}
    if group.num_processes > 1:
        every = [part for part in map(unpack, group.gather(pack(own))) if part]
        own = {key: np.concatenate([part[key] for part in every]) for key in (every[0] if every else ())}
    if not own:
        return {}
    order = np.argsort(own["indices"], kind="stable")
    return {key: rows[order] for key, rows in own.items()}


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """Return arrays as the bytes of an .npz."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # pyright: ignore  # it takes any name
    return buffer.getvalue()


def unpack(content: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of such bytes."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return {key: file[key] for key in file.files}
