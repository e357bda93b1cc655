"""Finds the networks in a checkpoint by the names of their parameters, and chooses one: an EMA or the raw parameters.

Trainers save networks under different entries (model, ema, state_dict, params ...) and inside different wrappers
(module., _orig_mod., net. ...), in any combination.  Every network of a kind has a certain parameter; what precedes its
name is the root of a network.  A root whose name mentions an average is an EMA.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from meanflow.console_log import say
from meanflow.errors import UserError

# Parameters that identify a network, in PyTorch and in Flax: first what we train, else Inception and autoencoders.
MARKS = (
    (
        ("x_embedder", "proj", "weight"), ("x_embedder", "proj", "kernel"), ("unet", "emb_fourier", "freqs"),
        ("map_layer0", "weight"),
    ),
    (("Conv2d_1a_3x3", "conv", "weight"), ("encoder", "conv_in", "weight"), ("encoder", "conv_in", "kernel")),
)  # fmt: skip
# Names that DDP, torch.compile, FSDP, rematerialisation and DeepSpeed add to a network or a part of one.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
AVERAGED = re.compile(r"(?:^|[^a-z])(?:ema|swa|shadow|avg|averaged?|polyak)(?:s|[^a-z]|$)", re.IGNORECASE)
OPTIMIZER = re.compile(r"^(opt|grad|exp_avg|momentum|trace$|mu$|nu$|lr_)", re.IGNORECASE)
# Entries of raw parameters, in order of preference.
RAW = ("model", "net", "state_dict", "params", "network", "online_model", "")
Root = tuple[str, ...]


class Network(NamedTuple):
    """The leaves of one network by their names below its root, and its name in messages."""

    leaves: dict[str, Any]
    label: str  # '' if the file gives it no name


def choose(tree: dict, ema: int | None, separator: str, where: Any) -> Network:
    """Return one network of a checkpoint: nested dicts, whose keys may themselves be joined by the separator.

    ema: which EMA, -1 for the raw parameters; if None, the first EMA, or the raw parameters if there is none.  where:
    the file, for messages.  Raises UserError if there is no such network, or if several match.
    """
    leaves = dict(found := list(walk(tree, separator)))
    if len(leaves) < len(found):
        raise UserError(f"{where} is damaged: it has one name twice, with and without a wrapper")
    roots = roots_of(leaves)
    if not roots:
        return Network({separator.join(parts): leaf for parts, leaf in fallback(leaves).items()}, "")
    root = pick(roots, ema, where)
    if ema is None and not is_average(root):
        refuse_unread_average(tree, root, where)
    mine = {p: leaf for p, leaf in leaves.items() if owner(p, roots) == root}
    others = [separator.join(p) for p, leaf in leaves.items() if owner(p, roots) is None and is_weight(p, leaf)]
    if others:
        shown = ", ".join(others[:3]) + (" ..." if len(others) > 3 else "")
        say(f"left out of {where}, not part of a known network: {shown} ({len(others)} in all)")
    return Network({separator.join(parts[len(root) :]): leaf for parts, leaf in mine.items()}, label(root))


def walk(tree: dict, separator: str, above: Root = ()) -> Iterator[tuple[Root, Any]]:
    """Yield (parts of its name, leaf) for every leaf of nested dicts and lists of dicts.

    The key of a leaf is split at the separator, and wrappers inside a network are left out.
    """
    for key, value in tree.items():
        if isinstance(value, list | tuple) and any(isinstance(entry, dict) for entry in value):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            yield from walk(value, separator, (*above, str(key)))
        else:
            parts = str(key).split(separator)
            inside = next((i for i, part in enumerate(parts) if part not in WRAPPERS), 0)
            yield (*above, *parts[:inside], *(part for part in parts[inside:] if part not in WRAPPERS)), value


def roots_of(leaves: dict[Root, Any]) -> list[Root]:
    """Return the root of each network, in file order."""
    for marks in MARKS:
        roots = {
            parts[: -len(mark)]: None
            for parts in leaves
            for mark in marks
            if parts[-len(mark) :] == mark and not any(OPTIMIZER.search(part) for part in parts[: -len(mark)])
        }
        if roots:
            return list(roots)
    return []


def owner(parts: Root, roots: list[Root]) -> Root | None:
    """Return the longest root that a name begins with, or None."""
    return max((root for root in roots if parts[: len(root)] == root), key=len, default=None)


def fallback(leaves: dict[Root, Any]) -> dict[Root, Any]:
    """Return the leaves of a usual entry, or all, if no network was found: the error message then names them."""
    for entry in ("ema", "ema_params", *RAW):
        chosen = {parts[1:]: leaf for parts, leaf in leaves.items() if len(parts) > 1 and parts[0] == entry}
        if chosen:
            return chosen
    return leaves


def is_weight(parts: Root, leaf: Any) -> bool:
    """Return whether a leaf outside the networks is an array other than a counter or optimizer state."""
    return bool(getattr(leaf, "ndim", 0)) and not any(OPTIMIZER.search(part) for part in parts)


def is_average(root: Root) -> bool:
    """Return whether a root belongs to an EMA."""
    return any(AVERAGED.search(part) for part in root)


def label(root: Root) -> str:
    """Return the name of the network below a root in messages: its entries without wrappers."""
    return ".".join(part for part in root if part not in WRAPPERS)


def pick(roots: list[Root], ema: int | None, where: Any) -> Root:
    """Return the root of the network that `ema` asks for, see `choose`.  Raises UserError."""
    averages, raw = numbered([root for root in roots if is_average(root)]), [r for r in roots if not is_average(r)]
    if ema is None and averages:
        return averages[min(averages)]
    if ema is not None and len(roots) == 1 and not label(roots[0]):
        raise UserError(f"{where} holds one network and does not say whether it is an EMA: leave out --ema")
    if ema is not None and ema >= 0:
        if ema in averages:
            return averages[ema]
        raise UserError(f"{where} has no {missing(averages, ema)} (--ema {ema}), only {there(averages, raw)}")
    if not raw:
        raise UserError(f"{where} has no raw parameters (--ema {ema}), only {there(averages, raw)}")
    ranks = [rank(root) for root in raw]
    best = [root for root, position in zip(raw, ranks, strict=True) if position == min(ranks)]
    if len(best) > 1 or (ema is not None and ema < -1):
        problem = f"no network {ema}" if len(best) == 1 else "several networks"
        raise UserError(f"{where} has {problem}: {there(averages, raw)}.  Choose one by --ema or --prefix")
    return best[0]


def rank(root: Root) -> int:
    """Return the position of a root of raw parameters in `RAW`."""
    names = [part for part in root if part not in WRAPPERS] or [""]
    return min((RAW.index(name) for name in (names[0], names[-1]) if name in RAW), default=len(RAW))


def numbered(averages: list[Root]) -> dict[int, Root]:
    """Return the EMAs by number: that in their names (net_ema is 0, net_ema1 is 1), or their position in the file."""
    found: dict[int, Root] = {}
    for root in averages:
        name = next(part for part in root if AVERAGED.search(part))
        number = re.fullmatch(r"\D*(\d{0,2})", name)
        if number is None or int(number[1] or 0) in found:
            return dict(enumerate(averages))
        found[int(number[1] or 0)] = root
    return dict(sorted(found.items()))


def missing(averages: dict[int, Root], ema: int) -> str:
    """Return the name in messages of an EMA that does not exist."""
    name = label(next(iter(averages.values()), ()))
    return re.sub(r"^.*\.|\d+$", "", name) + str(ema) if len(averages) > 1 and name else f"EMA {ema}"


def there(averages: dict[int, Root], raw: list[Root]) -> str:
    """Return the networks of a file, named by where they differ, and the values of --ema."""
    roots = [*raw, *averages.values()]
    shared = 0
    while len(roots) > 1 and len({root[: shared + 1] for root in roots}) == 1:
        shared += 1
    names = ", ".join(label(root[shared:]) or "one without a name" for root in roots)
    return f"{names} (--ema {', '.join(map(str, [-1] * bool(raw) + list(averages)))})"


def refuse_unread_average(tree: dict, root: Root, where: Any) -> None:
    """Raise UserError if a checkpoint has an EMA without known names, such as a list of arrays."""
    for key, value in tree.items():
        if AVERAGED.search(str(key)) and isinstance(value, dict | list) and value:
            raise UserError(
                f"{where}: its {str(key)!r} is not a network with known names; --ema -1 takes the raw "
                f"parameters, {label(root) or 'those beside it'}"
            )
