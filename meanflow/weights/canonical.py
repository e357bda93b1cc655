"""Canonical weights, numpy arrays by the names of the official PyTorch code: checks, and what a network starts from."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from absl import logging

from meanflow.errors import UserError
from meanflow.tables import position_table
from meanflow.weights import classes, unknown

# Largest difference between a given table and the computed one, relative to the largest entry.  Official trainers
# average fixed tables with the parameters, which drifts by up to 1.6e-4 in float32; bfloat16 rounds by 2e-3.
TABLE_TOLERANCE = 1e-2
KINDS = {  # of networks, each with a parameter that only it has
    "EDM2's U-Net (edm2)": "unet.emb_fourier.freqs",
    "a U-Net (unet)": "map_layer0.weight",
    "improved MeanFlow's transformer (imf_dit)": "omega_tokens",
    "a DiT (dit, dmf_dit)": "blocks.0.mlp.fc1.weight",
}
CLASSES = ("y_embedder.embedding_table.weight", "y_embedder.embedding_table._flax_embedding.weight")
LABELS = "unet.emb_label.weight"  # EDM2's class embedding, [channels classes]; the others are [classes + 1, channels]
POSITIONS = "pos_embed"  # the only table whose size depends on the resolution
RESIZABLE = {
    "num_classes",
    "input_size",
}  # options of `config.model` in which a run may differ from what it starts from
# Prefixes of the parameters that a network may have in addition to those of the one it starts from (MeanFlow's embedder
# of t - r, REPA's projectors, decoupled MeanFlow's log-variance), and of those that it may not need.
ADDED = ("r_embedder.", "projectors.", "logvar_linear.")
ADDED_WHOLE = ("v_heads.", "v_final_layer.")  # the same, if all of them are missing, as in released weights
UNUSED = ("projectors.", "logvar_linear.", "logvar_fourier.", "unet.emb_noise.")
SCALARS = "_gain"  # names of scalars end so; PyTorch files may give them an axis of length 1, which FSDP needs
NOT_FLOATING = "biucOSU"  # kinds of numpy types
Shapes = Mapping[str, tuple[int, ...]]
Weights = Mapping[str, np.ndarray]
Names = dict[str, str]


def check(weights: Weights, expected: Shapes, tables: Weights) -> None:
    """Check that canonical weights fit a network.

    expected: shapes of its parameters and tables by name.  tables: the fixed ones, as the network computes them.
    Raises UserError naming what does not fit and the config options that would explain it.
    """
    shapes = {name: tuple(np.shape(a)) for name, a in weights.items()}
    hint = difference(shapes, expected)
    for problem, names in (
        ("lack", expected.keys() - shapes.keys()),
        ("have unknown", shapes.keys() - expected.keys()),
    ):
        if names:
            why = hint or prefixed(shapes, expected) or without_hint(shapes, expected)
            raise UserError(f"the weights {problem} {some(names)}{why}")
    for name, table in tables.items():
        check_table(name, np.asarray(weights[name]), table, hint)
    for name in sorted(expected.keys() - tables.keys()):
        if shapes[name] != tuple(expected[name]):
            wanted = f"{name} has shape {shapes[name]}, the network wants {tuple(expected[name])}"
            raise UserError(wanted + (hint or "; does the config match?"))
        check_floating(name, np.asarray(weights[name]))


def check_floating(name: str, given: np.ndarray) -> None:
    """Raise UserError if weights are not floating-point numbers."""
    if given.dtype.kind in NOT_FLOATING:
        raise UserError(f"{name} is of type {given.dtype}: weights must be floating-point numbers, not quantised")


def transfer(
    own: Weights, given: Weights, fit_command: str, resize: bool = False, load_classes: str = ""
) -> dict[str, np.ndarray]:
    """Return the weights with which a network starts from `given`, those of another network of its family.

    own: the network's fresh weights.  Parameters that only it has (`ADDED`, `ADDED_WHOLE`) keep their fresh values;
    weights that only the other one has (`UNUSED`) are dropped.  resize: its number of classes and resolution may differ
    too, see `resized`.  All this is logged; everything else must fit, see `check`.
    fit_command: makes an EDM2 network of one time a start for one of two, named by the UserError raised if it must run.
    """
    if "unet.emb_noise_r.weight" in own.keys() - given.keys() and "unet.emb_noise.weight" in given:
        raise UserError(
            "the weights to start from belong to an EDM2 network of one time, but this one takes two: fit its time "
            f"embeddings first ({fit_command}) and start from its output"
        )
    added = ADDED + tuple(prefix for prefix in ADDED_WHOLE if not any(name.startswith(prefix) for name in given))
    fresh = {name: name for name in sorted(own.keys() - given.keys()) if name.startswith(added)}
    dropped = {name: name for name in sorted(given.keys() - own.keys()) if name.startswith(UNUSED)}
    start = {name: a for name, a in given.items() if name not in dropped} | {name: own[name] for name in fresh}
    if resize:
        arrays, new, lost = resized(own, given, load_classes)
        start, fresh, dropped = start | arrays, fresh | new, dropped | lost
    if fresh or dropped or load_classes:
        kept = start.keys() - fresh.keys() - ({POSITIONS} & dropped.keys())
        parts = ((fresh, "start fresh"), (dropped, "are left out"))
        told = [f"{', '.join(names.values())} {text}" for names, text in parts if names]
        logging.info("of the weights to start from, %s", "; ".join([f"{len(kept)} are kept", *told]))
    return start


def resized(own: Weights, given: Weights, load_classes: str) -> tuple[dict[str, np.ndarray], Names, Names]:
    """Return arrays of `given` as a network of another number of classes or another resolution starts with them.

    The class embedding has the rows that the file `load_classes` names, see `classes.read`; if that is empty and the
    numbers of classes differ, all rows are fresh.  The row of the null label is kept.  Fixed positions are those of the
    network, provided that the given ones are what a network of the other resolution computes.
    own, given: see `transfer`.  Nothing is resized if the networks differ in another option.
    Returns also what becomes fresh and what is dropped, {name: its description}.
    """
    ours, theirs = (sizes({name: np.shape(a) for name, a in weights.items()}) for weights in (own, given))
    both = ours.keys() & theirs.keys()
    differing = {name for name in both if ours[name] != theirs[name]}
    arrays, fresh, dropped = {}, {}, {}
    if not differing <= RESIZABLE:
        return arrays, fresh, dropped
    if POSITIONS in own.keys() & given.keys() and "input_size" in differing:
        check_positions(given[POSITIONS], own[POSITIONS].shape[-1])
        arrays[POSITIONS] = own[POSITIONS]
        dropped[POSITIONS] = f"{POSITIONS} ({given[POSITIONS].shape[-2]} positions)"
    if not ("num_classes" in differing or (load_classes and "num_classes" in both)):
        return arrays, fresh, dropped
    new, old = int(ours["num_classes"]), int(theirs["num_classes"])
    for name in own.keys() & given.keys() & {*CLASSES, LABELS}:
        rows = classes.read(load_classes, new, old) if load_classes else [None] * new
        arrays[name] = take_classes(name, own[name], given[name], rows)
        num_fresh, num_dropped = rows.count(None), old - len({*rows} - {None})
        fresh |= {name: f"{name} ({num_fresh} of {new} classes)"} if num_fresh else {}
        dropped |= {name: f"{name} ({num_dropped} of {old} classes)"} if num_dropped else {}
    return arrays, fresh, dropped


def take_classes(name: str, own: np.ndarray, given: np.ndarray, rows: Sequence[int | None]) -> np.ndarray:
    """Return a class embedding with these rows of `given`, for None those of `own`, and the given null label, if any.

    EDM2's embedding, `LABELS`, has columns instead.  The network divides each of its rows by its magnitude, so the
    columns kept are rescaled by the ratio of the magnitudes with the old and with the new classes.
    """
    check_floating(name, given)
    axis = 1 if name == LABELS else 0
    if own.shape[1 - axis] != given.shape[1 - axis] or not given.size:
        return given  # reported by `check`
    taken = [own.take(i, axis) if row is None else given.take(row, axis) for i, row in enumerate(rows)]
    null = [] if name == LABELS else [given[-1]]
    return np.stack(taken + null, axis)


def check_positions(given: np.ndarray, width: int) -> None:
    """Raise UserError unless `given` is the fixed table of positions of a network of this width, of any resolution."""
    side = math.isqrt(given.shape[-2])
    check_table(
        POSITIONS, given, position_table(side, width)[None], f" (compared with that of {side} x {side} positions)"
    )


def check_table(name: str, given: np.ndarray, table: np.ndarray, hint: str = "") -> None:
    """Raise UserError if a given table differs from the computed one in size or values.

    Axes of length 1, rounding and averaging are tolerated, since the network uses the computed table.
    """
    if np.squeeze(given).shape != np.squeeze(table).shape:
        raise UserError(f"the table {name} has shape {given.shape}, this network's has {table.shape}{hint}")
    error = np.abs(np.squeeze(given).astype(np.float64) - np.squeeze(table)).max()
    if not error <= TABLE_TOLERANCE * np.abs(table).max():
        raise UserError(
            f"the table {name} is not the one this network computes: entries differ by up to {error:.2g}, more than "
            f"rounding or averaging explains; the weights are damaged or belong to another network{hint}"
        )


def some(names: Iterable[str]) -> str:
    """Return up to three names and the number of names."""
    names = sorted(names)
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "") + f" ({len(names)} in all)"


def without_hint(given: Shapes, expected: Shapes) -> str:
    """Return the end of an error message about names, from which no option can be told: the nearest ones."""
    described = unknown.describe(given.keys() - expected.keys(), expected.keys() - given.keys())
    return "; ".join(filter(None, ("; does the config match them?", described)))


def prefixed(given: Shapes, expected: Shapes) -> str:
    """Return the end of an error message if all names have a prefix that canonical names lack, otherwise ''."""
    last = next(iter(expected), "")
    for name in given:
        prefix = name.removesuffix(last)
        if prefix and prefix != name and all(other.startswith(prefix) for other in given):
            return f": their names begin with {prefix!r}; python -m parity.convert SOURCE DEST removes it"
    return ""


def difference(given: Shapes, expected: Shapes) -> str:
    """Return the end of an error message that names the options in which two networks differ, '' if none is found."""
    kinds = [next((kind for kind, mark in KINDS.items() if mark in shapes), "") for shapes in (given, expected)]
    if all(kinds) and kinds[0] != kinds[1]:
        return f": they belong to {kinds[0]}, but config.model.name is that of {kinds[1]}"
    theirs, ours = sizes(given), sizes(expected)
    names = [name for name in ours if name in theirs and theirs[name] != ours[name]]
    if not names:
        return ""
    there, here = (", ".join(f"config.model.{name} {size[name]}" for name in names) for size in (theirs, ours))
    return f": the weights have {there}, this network has {here}.  Set these options, or choose other weights"


def sizes(shapes: Shapes) -> dict[str, float]:
    """Return the options of `config.model` that are evident from names and shapes of canonical weights."""
    found: dict[str, float] = {}
    for name, shape in shapes.items():
        first = re.fullmatch(r"(?:unet\.)?enc\.(\d+)x\1_conv\.weight", name)
        if first and len(shape) == 4:
            found |= {"input_size": int(first[1]), "width": shape[0]}
        elif name in CLASSES and len(shape) == 2:
            found["num_classes"] = shape[0] - 1
        elif name == "unet.emb_label.weight" and len(shape) == 2:
            found["num_classes"] = shape[1]
        elif name == "x_embedder.proj.weight" and len(shape) == 4:
            found |= {"width": shape[0], "channels": shape[1], "patch_size": shape[2]}
        elif name == "blocks.0.mlp.fc1.weight" and len(shape) == 2 and shape[1]:
            found["mlp_ratio"] = shape[0] / shape[1]
    blocks = {m[0] for name in shapes if (m := re.match(r"(blocks|shared_blocks|u_heads)\.\d+\.", name))}
    if blocks:
        found["depth"] = len(blocks)
    if "patch_size" in found and len(shapes.get("pos_embed", ())) > 1:
        found["input_size"] = math.isqrt(shapes["pos_embed"][-2]) * found["patch_size"]
    return found
