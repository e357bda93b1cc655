"""The processes of one command, and how their results are gathered."""

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class ProcessGroup(NamedTuple):
    """One process of a command, and its place among them."""

    process: int = 0
    num_processes: int = 1
    gather: Callable[[bytes], list[bytes]] = lambda part: [
        part
    ]  # from the bytes of each process to those of all, in the first
    together: bool = False  # all processes compute every batch together and hold all its rows; else they take turns


ALONE = ProcessGroup()


def gather_rows(parts: list[dict[str, np.ndarray]], group: ProcessGroup) -> dict[str, np.ndarray]:
    """Return the rows {name: [n ...]} of all processes, ordered by `indices`; only in the first, {} in the others.

    Every process must call it.  parts: batches of this process, with the same names; may be empty.
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
    np.savez(buffer, **arrays)  # pyright: ignore  # any name is allowed
    return buffer.getvalue()


def unpack(content: bytes) -> dict[str, np.ndarray]:
    """Return the arrays in the bytes of an .npz."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return {key: file[key] for key in file.files}
