"""Whoever writes the shards, and however often they are killed: the same dataset, or an error that names the reason."""

import importlib.util
import json
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from meanflow.data import records, sources
from meanflow.errors import UserError

SCRIPT = pathlib.Path(__file__).with_name("write_records.py")
spec = importlib.util.spec_from_file_location("write_records", SCRIPT)
write_records = importlib.util.module_from_spec(spec)
spec.loader.exec_module(write_records)
SETTINGS, layout, of_shard = write_records.SETTINGS, write_records.layout, write_records.of_shard


def write(directory, process=0, num_processes=1, of_shard=of_shard, **changes):
    records.begin(layout(directory), SETTINGS | changes)
    return records.write(layout(directory), of_shard, process, num_processes, {"from": "a test"})


def content(directory):
    """Return {file name: bytes} of all that is there, hidden files too."""
    return {path.name: path.read_bytes() for path in pathlib.Path(directory).iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("records") / "whole"
    assert write(directory) == []
    return directory


def test_a_dataset_of_tfds(whole):
    source = sources.open_source(str(whole), "train", "")
    assert [source[i]["label"] for i in range(len(source))] == list(range(23))
    for i in range(23):
        np.testing.assert_array_equal(source[i]["image"], np.full((2, 2, 1), i, np.float32))
    assert {path.name for path in whole.iterdir()} == {
        "settings.json", "metadata.json", "dataset_info.json", "features.json",
        *(f"numbers-train.array_record-0000{i}-of-00005" for i in range(5)),
    }  # fmt: skip
    assert json.loads((whole / "metadata.json").read_text()) == {"from": "a test"}
    assert (whole / "settings.json").stat().st_mode == (whole / "features.json").stat().st_mode


def test_splits_and_labels(whole):
    assert len(sources.open_source(str(whole), "train[:7]", "")) == 7
    labels = sources.open_labels(str(whole), "train[10:]", "")
    assert [labels[i] for i in range(len(labels))] == list(range(10, 23))


def test_the_bytes_of_a_record_are_the_same_in_every_process(whole):
    """Its features are sorted; protobuf's own order is that of a hash, another one in half of the processes."""
    reader = records.array_record_module.ArrayRecordReader(str(whole / "numbers-train.array_record-00000-of-00005"))
    found = reader.read_all()
    reader.close()
    assert len(found) == 5 and all(0 < raw.index(b"image") < raw.index(b"label") for raw in found)


def test_shards():
    assert records.split_into_shards(7, 3) == [range(0, 3), range(3, 6), range(6, 7)]
    assert records.split_into_shards(6, 3) == [range(0, 3), range(3, 6)]
    assert records.split_into_shards(2, 3) == [range(0, 2)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_processes_write_the_files_of_one(order, whole, tmp_path):
    """Whichever of them ends last."""
    missing = {0: {0, 3}, 1: {1, 4}, 2: {2}}
    left = set(range(5))
    for process in order:
        assert not (tmp_path / "features.json").exists()
        left -= missing[process]
        assert write(tmp_path, process, 3) == sorted(left)
    assert content(tmp_path) == content(whole)


def test_goes_on_after_a_kill(whole, tmp_path):
    command = subprocess.run([sys.executable, SCRIPT, tmp_path, "2"], capture_output=True)
    assert command.returncode == -signal.SIGKILL, command.stderr
    there = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert there == {"settings.json", *(f"numbers-train.array_record-0000{i}-of-00005" for i in (0, 1))}
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # the half shard, and it will go
    with pytest.raises(UserError, match=f"{tmp_path} .* is not whole: run the command"):
        sources.open_source(str(tmp_path), "train", "")
    written = []

    def noted(number):
        written.append(number)
        return of_shard(number)

    assert write(tmp_path, of_shard=noted) == []
    assert written == [2, 3, 4]
    assert content(tmp_path) == content(whole)


def test_metadata_that_a_kill_left_out(whole, tmp_path):
    for process in (0, 1):
        write(tmp_path, process, 2)
    (tmp_path / "features.json").unlink()
    assert write(tmp_path, 1, 2, of_shard=None) == []
    assert content(tmp_path) == content(whole)


def test_an_error_leaves_no_half_shard(tmp_path):
    def failing(number):
        yield from of_shard(number)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(tmp_path, of_shard=failing)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_empty_shards_among_others(tmp_path):
    assert write(tmp_path, of_shard=lambda number: of_shard(number) if number in (1, 4) else ()) == []
    source = sources.open_source(str(tmp_path), "train", "")
    assert [source[i]["label"] for i in range(len(source))] == [5, 6, 7, 8, 9, 20, 21, 22]


def test_no_record_at_all(tmp_path):
    with pytest.raises(UserError, match="5 shards .* have no record"):
        write(tmp_path, of_shard=lambda number: ())


def test_other_settings(whole):
    with pytest.raises(UserError, match=r"other settings: seed \(3 there, 4 here\), more \(None there, True here\)\. "):
        write(whole, seed=4, more=True)
    with pytest.raises(UserError, match=r"num_shards \(5 there, 6 here\)"):
        records.begin(layout(whole)._replace(num_shards=6), SETTINGS)
    records.begin(layout(whole), SETTINGS)


def test_directories_that_cannot_be(tmp_path):
    (tmp_path / "photo.png").touch()
    with pytest.raises(UserError, match="holds other files, photo.png for one: name a new directory"):
        write(tmp_path)
    with pytest.raises(UserError, match="cannot write .*photo.png"):
        write(tmp_path / "photo.png")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "settings.json").write_text("{")
    with pytest.raises(UserError, match="settings.json is damaged"):
        write(broken)


def test_a_full_disk(tmp_path, monkeypatch):
    class Full:
        def __init__(self, path, options):
            pass

        def write(self, example):
            raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(records.array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(UserError, match=f"cannot write {tmp_path}: .*No space left.*  Free the disk"):
        write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def noted(directory, process=0, num_processes=1, of_shard=of_shard, seen=None):
    """Write with a note on each shard, of which the metadata are made."""
    there = layout(directory)
    records.begin(there, SETTINGS)

    def tallied(number):
        yield from of_shard(number)
        records.keep_note(there, number, {"first": write_records.SHARDS[number].start, "third": 1 / 3 + number})

    def metadata():
        assert seen is None or not seen.append(there.missing())
        return records.read_notes(there)

    return records.write(there, tallied, process, num_processes, metadata)


def test_metadata_of_notes(tmp_path, whole):
    """Made once all shards are there, in their order; the notes go."""
    seen = []
    assert noted(tmp_path, 1, 2, seen=seen) == [0, 2, 4] and not seen
    assert (tmp_path / ".numbers-train.notes" / "00003.json").exists()
    assert noted(tmp_path, 0, 2, seen=seen) == [] and seen == [[]]
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    assert metadata == [{"first": 5 * i, "third": 1 / 3 + i} for i in range(5)]
    assert content(tmp_path).keys() == content(whole).keys()


def test_notes_outlive_an_error(tmp_path):
    def failing(number):
        yield from of_shard(number)
        if number == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        noted(tmp_path / "two", of_shard=failing)
    noted(tmp_path / "two")
    noted(tmp_path / "one")
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_a_shard_without_its_note(tmp_path):
    noted(tmp_path, 0, 2)
    (tmp_path / ".numbers-train.notes" / "00002.json").unlink()
    with pytest.raises(UserError, match="00002-of-00005 has no note in .*00002.json: delete both, and run"):
        noted(tmp_path, 1, 2)
    (tmp_path / "numbers-train.array_record-00002-of-00005").unlink()
    assert noted(tmp_path) == []


def test_another_process_completes_first(tmp_path):
    """And clears the notes away, while this one is to read them."""
    for process in (0, 1):
        noted(tmp_path, process, 2)
    whole = content(tmp_path)
    features = tmp_path / "features.json"
    features.rename(tmp_path / ".features.json")

    def late():
        (tmp_path / ".features.json").rename(features)
        return records.read_notes(layout(tmp_path))

    assert records.write(layout(tmp_path), of_shard, metadata=late) == []
    assert content(tmp_path) == whole


def test_leftovers_of_a_kill_between_the_last_file_and_the_notes(tmp_path, whole):
    write(tmp_path)
    (tmp_path / ".numbers-train.notes").mkdir()
    write(tmp_path)
    assert content(tmp_path) == content(whole)
