"""Digests of the files that a config names: unchanged if they move, different if their content changes."""

import hashlib
import os
import pathlib

import numpy as np

from meanflow.config import options
from meanflow.data import sources

NUM_RECORDS = 256  # read for a digest, spread over the dataset


def of_config(config: options.Config, teacher: dict[str, np.ndarray] | None = None) -> dict[str, str]:
    """Return {option: digest} of the data of a run and, if it has them, of its encoder and its teacher.

    teacher: canonical weights {name: array}.  Raises UserError as `sources.open_source`.
    """
    c = config.data
    found = {"data.name": of_dataset(c.name, c.split, c.dir)}
    found |= {"data.encoder": of_path(c.encoder)} if "encoder" in c and c.encoder else {}
    return found | ({} if teacher is None else {"method.teacher": of_weights(teacher)})


def of_dataset(name: str, split: str, directory: str) -> str:
    """Return the digest of a split: of its length and `NUM_RECORDS` of its records.  Arguments as `open_source`."""
    records = sources.open_records(name, split, directory)
    total = hashlib.sha256(f"{len(records)} records".encode())
    for index in np.unique(np.linspace(0, len(records) - 1, NUM_RECORDS).astype(int)):
        for key, value in sorted(records[int(index)].items()):
            a = np.asarray(value)
            content = repr(a.tolist()).encode() if a.dtype.hasobject else np.ascontiguousarray(a).tobytes()
            total.update(f"{index} {key} {a.dtype} {a.shape} {len(content)}".encode() + content)
    return total.hexdigest()[:16]


def of_weights(weights: dict[str, np.ndarray]) -> str:
    """Return the digest of weights {name: array}."""
    total = hashlib.sha256()
    for name, a in sorted(weights.items()):
        total.update(f"{name} {a.dtype} {a.shape}".encode())
        total.update(np.ascontiguousarray(a).data)
    return total.hexdigest()[:16]


def of_path(name: str) -> str:
    """Return the digest of a file or of all files below a directory; otherwise (a name on a hub) the name itself."""
    path = pathlib.Path(name)
    if not path.exists():
        return name
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    total = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            total.update(f"{os.path.relpath(file, path)} {hashlib.file_digest(content, 'sha256').hexdigest()}".encode())
    return total.hexdigest()[:16]
