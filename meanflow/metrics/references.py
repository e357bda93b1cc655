"""Statistics of real images to compare generated ones with: read from the official formats, written in ours.

Ours is an .npz with mu [d], sigma [d d] and, if known, num_samples, features [n d], convention (the preprocessing of
the images) and image_size [2] (their height and width before it).  Statistics of DINOv2's features, with or without
Inception's in the same file, are under fd_dinov2/mu and so on.  Also read: ref_mu and ref_sigma instead of mu and
sigma, as in the official JAX code, and EDM2's pickles {kind: {mu, sigma}}.
"""

import io
import os
import pathlib
import zipfile
import zlib
from typing import Any, NamedTuple

import numpy as np

from meanflow import files
from meanflow.errors import UserError
from meanflow.weights import pickles

METRICS = ("fid", "fd_dinov2")  # statistics that a file can hold: of Inception's features, of DINOv2's
KINDS = {"fid": "fid", "kid": "fid", "pr": "fid", "fd_dinov2": "fd_dinov2"}  # metric: the statistics it compares with
KEYS = (("mu", "sigma"), ("ref_mu", "ref_sigma"))
ASYMMETRY = 1e-5  # relative to the largest entry: more than float32 rounding leaves in a covariance
MAKE = "make one with --make_reference"
# What zip and numpy raise for a truncated or altered file.
DAMAGE = (zipfile.BadZipFile, EOFError, LookupError, MemoryError, OverflowError, TypeError, ValueError, zlib.error)


class Reference(NamedTuple):
    """Statistics of the features of real images."""

    mean: np.ndarray  # [d]
    covariance: np.ndarray  # [d d], unbiased
    num_samples: int | None = None
    features: np.ndarray | None = None  # [n d] float32; KID, precision and recall need them
    convention: str = ""  # preprocessing of the images; "": unknown
    image_size: tuple[int, int] | None = None  # height and width in pixels; None: unknown


def read(path: str | os.PathLike, metric: str = "fid") -> Reference:
    """Return the statistics that `metric`, one of `KINDS`, compares with.

    In an .npz these are the arrays under the name of their kind, else those without a prefix.  Reading a pickle
    imports and calls nothing.  Raises UserError for a file that is missing, damaged, unsafe or incomplete, or whose
    arrays are not a mean and a covariance.
    """
    path = pathlib.Path(path)
    if metric not in KINDS:
        raise UserError(f"there are no reference statistics for {metric!r}, only for {', '.join(KINDS)}")
    try:
        read_entries = _read_npz if zipfile.is_zipfile(path) else _read_pickle
        reference = _from_entries(read_entries(path, KINDS[metric]), path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; choose another file, or {MAKE}") from error
    except UserError:
        raise
    except DAMAGE as error:
        raise UserError(f"cannot read {path} as statistics in an .npz: {error!r:.200}; download it again") from error
    _check(reference, str(path))
    return reference


def write(path: str | os.PathLike, references: Reference | dict[str, Reference]) -> None:
    """Write statistics as .npz, atomically; creates parent directories.

    references: statistics for FID, or {one of `METRICS`: statistics}.
    Raises UserError if there are none, for arrays that are not a mean and a covariance, or if writing fails.
    """
    if not references:
        raise UserError(f"there are no statistics for {path}: the metrics must include one of {', '.join(KINDS)}")
    arrays: dict[str, Any] = {}
    for kind, reference in ({"fid": references} if isinstance(references, Reference) else references).items():
        _check(reference, f"the {kind} reference to be written")
        entries = {"mu": reference.mean, "sigma": reference.covariance, "convention": reference.convention}
        entries |= {} if reference.image_size is None else {"image_size": reference.image_size}
        entries |= {} if reference.num_samples is None else {"num_samples": reference.num_samples}
        entries |= {} if reference.features is None else {"features": np.asarray(reference.features, np.float32)}
        arrays |= {_prefix(kind) + key: entry for key, entry in entries.items()}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    files.replace_bytes(path, buffer.getvalue())


def _prefix(kind: str) -> str:
    return "" if kind == "fid" else f"{kind}/"  # official code reads mu and sigma of Inception's features


def _from_entries(entries: dict[str, Any], path: pathlib.Path) -> Reference:
    names = next((names for names in KEYS if entries.keys() >= set(names)), None)
    if names is None:
        there = ", ".join(sorted(map(str, entries))) or "nothing"
        raise UserError(f"{path} has neither mu and sigma nor ref_mu and ref_sigma; it has {there}; {MAKE}")
    mean, covariance = (np.asarray(entries[name], np.float64) for name in names)
    features, num_samples, size = (entries.get(name) for name in ("features", "num_samples", "image_size"))
    return Reference(
        mean,
        covariance,
        None if num_samples is None else int(num_samples),
        None if features is None else np.asarray(features, np.float32),
        str(entries.get("convention", "")),
        None if size is None else (int(size[0]), int(size[1])),
    )


def _check(reference: Reference, name: str) -> None:
    """Raise UserError naming it unless this is a mean, a covariance and features of the same size."""
    mean, covariance, features = reference.mean, reference.covariance, reference.features
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{name}: mu {mean.shape} and sigma {covariance.shape} must have the shapes [d] and [d d]")
    if features is not None and (features.ndim != 2 or features.shape[1] != len(mean)):
        raise UserError(f"{name}: features {features.shape} must be rows of {len(mean)}, as mu is")
    for key, array in (("mu", mean), ("sigma", covariance), ("features", features)):
        if array is not None and not np.isfinite(array).all():
            raise UserError(f"{name}: {key} has values that are not finite; {MAKE}")
    if np.abs(covariance - covariance.T).max() > ASYMMETRY * np.abs(covariance).max():
        raise UserError(f"{name}: sigma is not symmetric, so it is not a covariance; {MAKE}")
    if np.diagonal(covariance).min() < 0:
        raise UserError(f"{name}: sigma has negative variances, so it is not a covariance; {MAKE}")


def _read_npz(path: pathlib.Path, kind: str) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        prefix = _prefix(kind) if any(key.startswith(_prefix(kind)) for key in file.files) else ""
        return {key.removeprefix(prefix): file[key] for key in file.files if key.startswith(prefix)}


def _read_pickle(path: pathlib.Path, kind: str) -> dict[str, Any]:
    whole = pickles.loads(path.read_bytes(), str(path))
    entries = whole.get(kind) if isinstance(whole, dict) else None
    if not isinstance(entries, dict):
        there = ", ".join(sorted(map(str, whole))) if isinstance(whole, dict) else ""
        raise UserError(f"{path} has no statistics of {kind}; it has {there or 'none by name'}; {MAKE}")
    return entries
