"""Reads folders and archives of weights into canonical weights: whatever libraries save as more than one file.

Orbax checkpoints, checkpoints of torch.distributed, weights split over several files, folders of accelerate and
diffusers, and a .zip of any of these.  Work directories of this project are read by `parity.sources`.
"""

import contextlib
import json
import math
import pathlib
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from meanflow.config import store
from meanflow.errors import UserError
from meanflow.weights import entries, files, pickles, sources
from meanflow.weights.sources import Source, choose_flax, from_flax_network, from_torch

ORBAX = ("_METADATA", "manifest.ocdbt")  # a file in a tree that Orbax saved, current or old
AGGREGATE = "checkpoint"  # the file in which Orbax before 0.5 kept small trees, as msgpack
PLACEHOLDER = "PLACEHOLDER://"  # there, of an array that is stored beside it
IN_FLIGHT = 2**27  # bytes that Orbax decompresses at a time, or twice its largest array
DISTRIBUTED = ".metadata"  # the file of torch.distributed.checkpoint that lists its tensors
DEPTH = 2  # of the items of a step, in a directory of steps
STEP = re.compile(r"(?:.*\D)?(\d+)")  # the name of a directory of one step: 10, checkpoint_10, checkpoint-10
INDEX = ".index.json"  # the end of the name of a file that says which file holds which weight
# Names that accelerate, transformers and diffusers give the one file of weights in a folder, the preferred first.
ONE_FILE = (
    "model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)  # fmt: skip
PIPELINE = "model_index.json"  # the file of a pipeline of diffusers that lists its parts
NETWORKS = ("transformer", "unet")  # folders of a pipeline that hold its network
# What the class that a folder of diffusers names says of its weights: the options of the trainer that made them.
# Source: Bili-Sakura/SiT-diffusers, pipeline_sit.py, which samples with v = data - noise and data at t = 1.
MADE_BY = {"SiTTransformer2DModel": {"path_type": "Linear", "prediction": "velocity"}}
# All that `.metadata` of torch.distributed.checkpoint may name; its library would import anything.
METADATA = re.compile(
    r"torch\.distributed\.checkpoint\.(metadata|filesystem)\.\w+|torch\.(Size|\w*(float|int|bool)\w*|strided|device)"
    r"|torch\.serialization\._get_layout|torch\._utils\.\w*layout\w*|collections\.OrderedDict"
    r"|torch\.distributed\.(_shard|tensor)[\w.]*\.(ShardMetadata|TensorProperties|MEM_FORMAT_ENCODING)"
    r"|pathlib(\._local)?\.(Pure)?PosixPath"
)
ENUMS = re.compile(r"torch\.distributed\..*MEM_FORMAT_ENCODING")  # of these, which is written by value or by name


def read(path: pathlib.Path, ema: int | None = None, prefix: str = "", step: int | None = None) -> Source:
    """Read a folder that is no work directory.  Raises UserError.

    ema, prefix: see `sources.read`.  step: of several checkpoints in it.
    """
    path = only_child(path)
    pipelines = sorted(child for child in path.iterdir() if (child / PIPELINE).is_file())
    if len(pipelines) > 1:
        raise UserError(f"{path} holds several pipelines of diffusers: name one, {listed(pipelines)}")
    path = at_step(pipelines[0] if pipelines else path, step)
    names = {child.name for child in path.iterdir()}
    if DISTRIBUTED in names:
        return read_distributed(path, ema, prefix)
    if PIPELINE in names:
        inner = next((path / name for name in NETWORKS if (path / name).is_dir()), None)
        if inner is not None:
            return read(inner, ema, prefix)
    index = next((path / name for name in sorted(names) if name.endswith(INDEX)), None)
    made_by = MADE_BY.get(class_of(path))
    if index is not None:
        return read_split(index, ema, prefix)._replace(arguments=made_by)
    one = next((path / name for name in ONE_FILE if name in names), None)
    if one is not None and not is_autoencoder(path):
        refuse_two_models(one, names)
        found = sources.read(one, ema, prefix)
        if found.ours and found.config is None:
            return found._replace(config=own_config(path))
        return found if made_by is None else found._replace(arguments=made_by)
    return read_orbax(path, ema, prefix)


def at_step(path: pathlib.Path, step: int | None) -> pathlib.Path:
    """Return the directory of one step in a directory of steps, or `path` itself if it is none.  Raises UserError."""
    steps = {int(m[1]): d for d in path.iterdir() if d.is_dir() and (m := STEP.fullmatch(d.name))}
    if step is not None:
        if step not in steps:
            raise UserError(f"{path} has no checkpoint of step {step}, only {listed_steps(steps)}")
        return steps[step]
    if len(steps) > 1 and not any((path / name).is_file() for name in (*ORBAX, DISTRIBUTED)):
        raise UserError(f"{path} holds several checkpoints, of steps {listed_steps(steps)}: choose one by --step")
    return path


def listed_steps(steps: dict[int, pathlib.Path]) -> str:
    """Return up to ten steps, for messages."""
    found = list(map(str, sorted(steps)))
    return ", ".join([*found[:3], "...", *found[-6:]] if found[9:] else found) or "none"


def only_child(path: pathlib.Path) -> pathlib.Path:
    """Return the folder inside which everything is, as an unpacked archive has it, unless that is a step's."""
    children = [child for child in path.iterdir() if not child.name.startswith("__MACOSX")]
    if len(children) == 1 and children[0].is_dir() and not STEP.fullmatch(children[0].name):
        return only_child(children[0])
    return path


@contextlib.contextmanager
def unpacked(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Unpack an archive for the time of the context, and yield the folder, or the one file in it.

    Raises UserError if it is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="weights-", dir=path.parent if writable(path.parent) else None) as name:
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(name)  # which leaves out '..' and roots
        except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as error:
            raise UserError(f"cannot unpack {path}: {sources.first_line(error)}.  Copy it again") from error
        folder = only_child(pathlib.Path(name))
        children = [child for child in folder.iterdir() if child.is_file()]
        yield children[0] if len(children) == 1 and len(list(folder.iterdir())) == 1 else folder


def writable(path: pathlib.Path) -> bool:
    """Return whether files can be made in a directory; beside a large file there is room, in /tmp there may be none."""
    try:
        with tempfile.TemporaryFile(dir=path):
            return True
    except OSError:
        return False


def read_split(index: pathlib.Path, ema: int | None, prefix: str) -> Source:
    """Read weights that an index assigns to several files beside it.  Raises UserError."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in places.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {index}, an index of weights: {error!r:.200}") from error
    tree: dict[str, Any] = {}
    for name in names:
        part = index.parent / name
        if pathlib.PurePath(name).name != name or not part.is_file():
            raise UserError(f"{index} names {name}, which is not beside it: copy the whole folder")
        loaded = files.load(part) if files.kind_of(part) == "safetensors" else sources.load_torch(part)
        if not isinstance(loaded, dict):
            raise UserError(f"{part} holds a {type(loaded).__name__}, not a state dict")
        tree |= loaded
    missing = sorted(places.keys() - tree.keys())
    if missing:
        raise UserError(f"{index} promises {missing[0]}, which no file has ({len(missing)} such names): copy it again")
    return from_torch(tree, ema, prefix, index.parent, f"weights in {len(names)} files")


def refuse_two_models(one: pathlib.Path, names: set[str]) -> None:
    """Raise UserError if accelerate saved several models and nothing says which is the network."""
    others = sorted(name for name in names if re.fullmatch(rf"{one.stem}_\d+{re.escape(one.suffix)}", name))
    if others:
        raise UserError(f"{one.parent} holds several models: name the file, {one.name} or {' or '.join(others)}")


def own_config(path: pathlib.Path) -> Any:
    """Return the config that `parity.convert` writes into a folder of weights, None without one.  Raises UserError."""
    file = path / "config.json"
    return store.from_json(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else None


def is_autoencoder(path: pathlib.Path) -> bool:
    """Return whether a folder of diffusers is that of an autoencoder."""
    return "Autoencoder" in class_of(path)


class Stored:
    """An array of a checkpoint that has not been read."""

    def __init__(self, shape: Iterable[int], dtype: Any):
        self.shape, self.dtype = tuple(shape), dtype
        self.ndim = len(self.shape)


def read_distributed(path: pathlib.Path, ema: int | None, prefix: str) -> Source:
    """Read one network of a checkpoint of torch.distributed; nothing but its tensors is loaded.  Raises UserError."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    check_metadata(path / DISTRIBUTED)
    try:
        listed = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        tensors = {name: entry for name, entry in listed.items() if isinstance(entry, TensorStorageMetadata)}
        stored = {name: Stored(entry.size, entry.properties.dtype) for name, entry in tensors.items()}
    except sources.DAMAGE as error:
        raise UserError(f"cannot read {path} as a checkpoint of torch.distributed: {error!r:.200}") from error
    network = entries.choose(sources.below(stored, prefix) if prefix else stored, ema, ".", path)
    names = {id(tensor): name for name, tensor in stored.items()}
    wanted = {names[id(leaf)]: torch.empty(leaf.shape, dtype=leaf.dtype) for leaf in network.leaves.values()}
    try:
        dcp.load(wanted, checkpoint_id=path, no_dist=True)  # pyright: ignore  # as state_dict, in place
    except (*sources.DAMAGE, dcp.api.CheckpointException) as error:
        raise UserError(f"cannot read {path}, it may be damaged: {error!r:.200}") from error
    leaves = {name: wanted[names[id(leaf)]] for name, leaf in network.leaves.items()}
    kind = sources.named("checkpoint of torch.distributed", network.label)
    return Source(sources.to_arrays(leaves, path), kind)


def check_metadata(path: pathlib.Path) -> None:
    """Raise UserError if a pickle that torch.distributed would load names anything else than that library's records."""
    try:
        pickles.load_records(path.read_bytes(), pickles.Matching(METADATA, ENUMS))
    except UserError as error:
        raise UserError(f"{path} {error}, which no list of tensors needs, and building it may run any code") from error
    except pickles.DAMAGE as error:
        raise UserError(f"cannot read {path}: {error!r:.200}") from error


def read_orbax(path: pathlib.Path, ema: int | None, prefix: str) -> Source:
    """Read one network of an Orbax checkpoint, whatever devices it was written on; no other array is loaded.

    path: its directory, or one above that holds no other.  Raises UserError.
    """
    import orbax.checkpoint as ocp

    path = orbax_in(path)
    tree = read_aggregate(path / AGGREGATE)
    aggregated = tree is not None
    handler = ocp.PyTreeCheckpointer()
    with named_as_damaged(path):
        if not aggregated:
            metadata: Any = handler.metadata(path.absolute())
            if metadata.item_metadata is None:
                raise ValueError("Orbax finds no tree of arrays in it")
            tree = map_leaves(lambda a: Stored(getattr(a, "shape", ()), None), metadata.item_metadata.tree)
    if not isinstance(tree, dict):
        raise UserError(f"{path} is an Orbax checkpoint, but its content is not a tree of parameters")
    network = choose_flax(tree, ema, prefix, path)
    if not aggregated:
        wanted = {id(leaf) for leaf in network.leaves.values()}
        item = map_leaves(lambda leaf: leaf if id(leaf) in wanted else ocp.PLACEHOLDER, tree)
        args = map_leaves(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        # Orbax holds what it decompresses at a time twice, and refuses an array that alone is more.
        sizes = (math.prod(leaf.shape) for leaf in network.leaves.values())
        limit = max(16 * max(sizes, default=0), IN_FLIGHT)  # float64 has 8 bytes
        with named_as_damaged(path):
            handler = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(restore_concurrent_gb=limit / 1e9))  # pyright: ignore
            restored = handler.restore(path.absolute(), item=item, restore_args=args)
        arrays = dict(zip(map(id, leaves_of(tree)), leaves_of(restored), strict=True))
        network.leaves.update({name: arrays[id(leaf)] for name, leaf in network.leaves.items()})
        del restored, arrays
    return from_flax_network(network, path, "Orbax checkpoint")


@contextlib.contextmanager
def named_as_damaged(path: pathlib.Path) -> Iterator[None]:
    """Turn what Orbax raises into a UserError."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"cannot read {path} as an Orbax checkpoint, it may be damaged: {sources.first_line(error)}"
        ) from error


def read_aggregate(path: pathlib.Path) -> Any:
    """Return the tree that Orbax before 0.5 kept in one msgpack file; None if there is none that has all arrays."""
    if not path.is_file():
        return None
    tree = sources.load_msgpack(path)
    return None if any(isinstance(leaf, str) and leaf.startswith(PLACEHOLDER) for leaf in leaves_of(tree)) else tree


def map_leaves(function, tree):
    """Map over nested dicts, lists and tuples; anything else is a leaf."""
    if isinstance(tree, dict):
        return {key: map_leaves(function, value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [map_leaves(function, value) for value in tree]
    return function(tree)


def leaves_of(tree) -> list:
    """Return the leaves of nested dicts, lists and tuples, in order of the names in each dict."""
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree, key=str) for leaf in leaves_of(tree[key])]
    return [leaf for value in tree for leaf in leaves_of(value)] if isinstance(tree, list | tuple) else [tree]


def orbax_in(path: pathlib.Path) -> pathlib.Path:
    """Return the directory of the only Orbax checkpoint in `path`.  Raises UserError saying what is there instead."""
    level = [path]
    for _ in range(DEPTH + 1):
        found = [d for d in level if any((d / name).is_file() for name in ORBAX)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{path} holds several Orbax checkpoints: name one, {listed(found)}")
        level = [child for d in level for child in sorted(d.iterdir()) if child.is_dir()]
    raise UserError(f"{path} is neither a work directory nor an Orbax checkpoint: {what_is(path)}")


def what_is(path: pathlib.Path) -> str:
    """Return what a folder without weights that could be read is, and what to do."""
    names = {child.name for child in path.iterdir()}
    if not names:
        return "it is empty"
    if any(name.endswith(".distcp") for name in names):
        return f"it is a checkpoint of torch.distributed without its {DISTRIBUTED}: copy the whole folder"
    kind = class_of(path)
    if PIPELINE in names or kind:
        what = kind or "a pipeline"
        return f"diffusers saved it ({what}); of a pipeline its transformer is read, and an autoencoder by latents.vae"
    weights = [child for child in sorted(path.iterdir()) if child.is_file() and holds_weights(child)]
    if weights:
        return f"name the file of weights in it, {listed(weights)}"
    if "config.json" in names:
        return "it has a config.json, but neither checkpoints/jax nor checkpoints/torch: the run has not saved yet"
    return f"it has neither checkpoints/jax, checkpoints/torch nor {ORBAX[0]}, here or in a directory below"


def class_of(path: pathlib.Path) -> str:
    """Return the class named in a config.json of diffusers, '' if there is none."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(config.get("_class_name", "")) if isinstance(config, dict) else ""


def holds_weights(path: pathlib.Path) -> bool:
    """Return whether a file is one that can be read, judged by its content."""
    try:
        return bool(files.kind_of(path))
    except UserError:
        return False


def listed(paths: list[pathlib.Path]) -> str:
    """Return up to three paths, for messages."""
    return " or ".join(map(str, paths[:3])) + (f" ({len(paths)} in all)" if paths[3:] else "")
