"""Writes datasets of ArrayRecord shards in TFDS's layout, by any number of processes, any of which may be killed.

    DIRECTORY/settings.json     what the records depend on, written by the first process
    DIRECTORY/NAME-SPLIT.array_record-00000-of-00010 ...     shards; one that exists is complete
    DIRECTORY/metadata.json, dataset_info.json, features.json     written once all shards exist
    DIRECTORY/.NAME-SPLIT.notes/00000.json ...     notes on shards, from which the metadata are made; then removed

`sources.open_source(DIRECTORY, SPLIT, "")` and TFDS read it.  If a process is killed, repeat the call: only the shard
that it was writing is redone.
"""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from array_record.python import array_record_module  # pyright: ignore  # compiled, without types

from meanflow.data.record_reader import FEATURES, FILE_FORMAT, SETTINGS, Feature
from meanflow.errors import UserError

METADATA = "metadata.json"
VERSION = "1.0.0"
OPTIONS = "group_size:1"  # as TFDS does: records can be read one by one


class Layout(NamedTuple):
    """The files of a dataset, which has one split."""

    directory: pathlib.Path
    name: str  # of the dataset: lower case, digits and underscores
    features: Mapping[str, Feature]
    num_shards: int
    split: str = "train"

    def shard(self, number: int) -> pathlib.Path:
        """Return the path of a shard."""
        return self.directory / f"{self.name}-{self.split}.{FILE_FORMAT}-{number:05}-of-{self.num_shards:05}"

    def note(self, number: int) -> pathlib.Path:
        """Return the path of the note on a shard, see `keep_note`."""
        return self.directory / f".{self.name}-{self.split}.notes" / f"{number:05}.json"

    def missing(self) -> list[int]:
        """Return the numbers of the shards that do not exist."""
        return [number for number in range(self.num_shards) if not self.shard(number).exists()]


def split_into_shards(num_records: int, shard_size: int) -> list[range]:
    """Return the record indices of each shard: `shard_size` of them, fewer in the last shard."""
    return [range(start, min(start + shard_size, num_records)) for start in range(0, num_records, shard_size)]


def own_shards(layout: Layout, process: int, num_processes: int) -> list[int]:
    """Return the numbers of the missing shards that process `process` of `num_processes` should write."""
    return [number for number in layout.missing() if number % num_processes == process]


def begin(layout: Layout, settings: Mapping[str, Any]) -> None:
    """Make the directory and store what the records depend on (JSON values), or compare with what is stored there.

    Raises UserError naming the settings that differ, for a directory with other files, or one that cannot be written.
    """
    settings = json.loads(json.dumps({**settings, "num_shards": layout.num_shards}))
    path = layout.directory / SETTINGS
    with _writing(layout.directory):
        layout.directory.mkdir(parents=True, exist_ok=True)
        there = [entry.name for entry in layout.directory.iterdir() if not entry.name.startswith(".")]
        if there and path.name not in there and not path.exists():
            raise UserError(f"{layout.directory} holds other files, {min(there)} for one: name a new directory")
        _create(path, json.dumps(settings, indent=2) + "\n")
        text = path.read_text()
    try:
        old = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: {error}.  Put back a copy of it, or name a new directory") from error
    differing = [key for key in {**settings, **old} if settings.get(key) != old.get(key)]
    if differing:
        shown = ", ".join(f"{key} ({old.get(key)!r} there, {settings.get(key)!r} here)" for key in differing)
        raise UserError(
            f"{layout.directory} was begun with other settings: {shown}.  Set them back, or name a new directory"
        )


def write(
    layout: Layout,
    records: Callable[[int], Iterable[Mapping[str, Any]]],
    process: int = 0,
    num_processes: int = 1,
    metadata: Any = None,
) -> list[int]:
    """Write this process's missing shards and, once all shards exist, the files that make them a dataset.

    Call `begin` first.  records: from the number of a shard to its records; the same in every process.
    metadata: JSON value, stored with the shards, or a function without arguments that returns it once all shards exist.
    Returns the numbers of the shards that others have yet to write: no process waits for them, the last one to finish
    completes the dataset, or, if it was killed, any later one.
    Raises UserError for a directory that cannot be written, or if all shards are empty.
    """
    for number in own_shards(layout, process, num_processes):
        num_records = _write_shard(layout, number, records(number))
        logging.info("%s: %d records", layout.shard(number).name, num_records)
    missing = layout.missing()
    if not missing:
        if not (layout.directory / FEATURES).exists():
            _complete(layout, metadata)
        for path in layout.directory.glob(
            f".{layout.name}-{layout.split}.*"
        ):  # notes, and leftovers of killed processes
            shutil.rmtree(path, ignore_errors=True)
    return missing


def announce(directory: str, missing: list[int]) -> None:
    """Report what `write` returned: print the directory of a complete dataset, or log which shards are missing."""
    if missing:
        logging.info(
            "%s misses %d shards, the first is %d.  Processes still at work write them; if none is, run the command "
            "again", directory, len(missing), missing[0],
        )  # fmt: skip
    else:
        print(directory)


def keep_note(layout: Layout, number: int, note: Any) -> None:
    """Store a JSON value about a shard until the dataset is complete.

    Call it at the very end of the iterator of the shard's records, so that every existing shard has its note.
    Raises UserError for a directory that cannot be written.
    """
    path = layout.note(number)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with _writing(layout.directory):
        path.parent.mkdir(exist_ok=True)
        with open(unfinished, "w") as file:
            file.write(json.dumps(note) + "\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)


def read_notes(layout: Layout) -> list[Any]:
    """Return the notes on all shards, in order.  Raises UserError naming a shard without a note."""
    notes = []
    for number in range(layout.num_shards):
        try:
            notes.append(json.loads(layout.note(number).read_text()))
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(
                f"{layout.shard(number)} has no note in {layout.note(number)}: delete both, and run the command again"
            ) from error
    return notes


def _write_shard(layout: Layout, number: int, records: Iterable[Mapping[str, Any]]) -> int:
    """Write a shard under a temporary name and rename it when complete.  Returns the number of its records."""
    from tensorflow_datasets.core import example_serializer  # slow to import, and only needed to write

    features = _tfds_features(layout)
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    final, count = layout.shard(number), 0
    with _unfinished(layout, final.name) as directory:
        path = directory / final.name
        with _writing(layout.directory):
            writer = array_record_module.ArrayRecordWriter(str(path), OPTIONS)
        for record in records:
            example = serializer.get_tf_example(features.encode_example(record))
            with _writing(layout.directory):
                writer.write(
                    example.SerializeToString(deterministic=True)
                )  # features.serialize_example is not deterministic
            count += 1
        with _writing(layout.directory):
            writer.close()
            with open(path, "rb") as file:  # on disk before it has its name, in case the machine stops
                os.fsync(file.fileno())
            path.replace(final)
    return count


def _complete(layout: Layout, metadata: Any) -> None:
    """Write the metadata, features.json last: it makes the directory a dataset."""
    shards = [layout.shard(number) for number in range(layout.num_shards)]
    lengths = [_num_records(shard) for shard in shards]
    if not any(lengths):
        raise UserError(f"the {len(shards)} shards of {layout.directory} have no record: nothing was kept")
    try:
        content = metadata() if callable(metadata) else metadata
    except UserError:
        if (layout.directory / FEATURES).exists():  # another process was faster and has removed the notes
            return
        raise
    import tensorflow_datasets as tfds

    identity = tfds.core.DatasetIdentity(layout.name, tfds.core.Version(VERSION), str(layout.directory), "")
    info = tfds.core.DatasetInfo(builder=identity, features=_tfds_features(layout))
    num_bytes = sum(shard.stat().st_size for shard in shards)
    template = tfds.core.ShardedFileTemplate(
        data_dir=layout.directory,  # pyright: ignore  # any path will do
        dataset_name=layout.name,
        split=layout.split,
        filetype_suffix=FILE_FORMAT,
    )
    split = tfds.core.SplitInfo(
        name=layout.split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template
    )
    info.set_file_format(FILE_FORMAT)
    info.set_splits(tfds.core.SplitDict([split]))
    with _writing(layout.directory), _unfinished(layout, METADATA) as directory:
        info.write_to_directory(directory)
        (directory / METADATA).write_text(json.dumps(content, indent=2) + "\n")
        for path in sorted(directory.iterdir(), key=lambda path: path.name == FEATURES):
            path.replace(layout.directory / path.name)


def _num_records(shard: pathlib.Path) -> int:
    try:
        reader = array_record_module.ArrayRecordReader(str(shard))
        try:
            return reader.num_records()
        finally:
            reader.close()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{shard} is damaged ({error}): delete it, and run the command again") from error


def _tfds_features(layout: Layout) -> Any:
    """Return the features of a dataset as TFDS represents them."""
    from tensorflow_datasets import features

    makers = {
        "array": lambda shape: features.Tensor(shape=shape, dtype=np.float32, encoding="bytes"),
        "image": lambda shape: features.Image(shape=shape, encoding_format="png"),
        "integer": lambda _: features.Scalar(np.int64),
        "text": lambda _: features.Text(),
    }
    return features.FeaturesDict({name: makers[kind](shape) for name, (kind, shape) in layout.features.items()})


def _create(path: pathlib.Path, text: str) -> None:
    """Write a file atomically unless it exists; among several processes the first one writes it."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    unfinished.write_text(text)
    try:
        os.link(unfinished, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        with contextlib.suppress(FileExistsError), open(path, "x") as file:
            file.write(text)
    unfinished.unlink()


@contextlib.contextmanager
def _unfinished(layout: Layout, name: str) -> Iterator[pathlib.Path]:
    """Make a hidden directory next to the shards for unfinished files; it is removed at the end with its content."""
    with _writing(layout.directory):
        unfinished = tempfile.TemporaryDirectory(prefix=f".{name}.", dir=layout.directory)
    with unfinished as path:
        yield pathlib.Path(path)


@contextlib.contextmanager
def _writing(directory: pathlib.Path) -> Iterator[None]:
    """Turn disk errors into UserError; ArrayRecord raises RuntimeError for them."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot write {directory}: {error}.  Free the disk, or name a directory that you can write"
        ) from error
