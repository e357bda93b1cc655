"""Other people's latents: the same dataset from each format, and nothing of them executed or passed over."""

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
import zipfile

import lmdb
import numpy as np
import pytest
import tensorflow_datasets as tfds
import torch

from meanflow.commands import import_latents
from meanflow.config import latents as conventions
from meanflow.data.latents import dataset, formats, importers
from meanflow.errors import UserError

NUM = 7
C, H, W = 3, 4, 4
KINDS = ("lmdb", "pt", "edm2")
LABELS = [i % 2 for i in range(NUM)]


def moments(i, flipped=False):
    """Return moments [2c h w]: mean and standard deviation."""
    rng = np.random.default_rng(i)
    found = np.concatenate([rng.normal(3, 2, (C, H, W)), rng.uniform(0.1, 2, (C, H, W))]).astype(np.float32)
    return found[:, :, ::-1].copy() if flipped else found


def with_log(array):
    """Return moments with the log-variance in place of the standard deviation."""
    return np.concatenate([array[:C], 2 * np.log(array[C:])]).astype(np.float32)


def write_lmdb(path, records, num_samples=b"%d" % NUM):
    path.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=2**22) as environment, environment.begin(write=True) as transaction:
        for key, record in records.items():
            transaction.put(key.encode(), record if isinstance(record, bytes) else pickle.dumps(record))
        if num_samples is not None:
            transaction.put(b"num_samples", num_samples)
    return path


def lmdb_records(to=lambda array: array):
    return {
        str(i): {
            "moments": to(with_log(moments(i))),
            "moments_flip": to(with_log(moments(i, True))),
            "label": LABELS[i],
        }
        for i in range(NUM)
    }


def write_pt(path, entry=lambda i: {"image": torch.tensor(moments(i)), "image_flip": torch.tensor(moments(i, True))}):
    for i in range(NUM):
        (path / f"class{LABELS[i]}").mkdir(parents=True, exist_ok=True)
        torch.save(entry(i), path / f"class{LABELS[i]}" / f"{i}.pt")
    return path


def write_edm2(path, labels=None):
    for i in range(NUM):
        (path / "00000").mkdir(parents=True, exist_ok=True)
        np.save(path / "00000" / f"img-{i}.npy", moments(i))
    index = {"labels": [[f"00000/img-{i}.npy", LABELS[i]] for i in range(NUM)]} if labels is None else labels
    (path / "dataset.json").write_text(json.dumps(index))
    return path


WRITE = {"lmdb": lambda path: write_lmdb(path, lmdb_records()), "pt": write_pt, "edm2": write_edm2}


@pytest.fixture
def write(tmp_path):
    """Return a function (format) -> a store of it."""
    return lambda kind: WRITE[kind](tmp_path / f"{kind}_store")


def run(kind, source, dest, *flags):
    import_latents.main([kind, str(source), str(dest), *flags])
    return dataset.read_metadata(str(dest))


def read(directory):
    source = tfds.builder_from_directory(str(directory)).as_data_source("train")
    return [source[i] for i in range(len(source))]


def digests(directory):
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("kind", KINDS)
def test_latents(kind, write, tmp_path, capsys):
    source = write(kind)
    metadata = run(kind, source, tmp_path / "dest", "--vae", "mine", "--shard_size", "3")
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'dest'}: {NUM} latents of the convention ")
    found = read(tmp_path / "dest")
    order = sorted(range(NUM), key=lambda i: (LABELS[i], i)) if kind == "pt" else range(NUM)
    names = {"lmdb": "{i}", "pt": "class{label}/{i}.pt", "edm2": "00000/img-{i}.npy"}
    for record, i in zip(found, order, strict=True):
        assert record["moments"].dtype == np.float32
        np.testing.assert_allclose(record["moments"], moments(i).transpose(1, 2, 0), rtol=1e-6)
        assert record["label"] == LABELS[i]
        assert record["name"].decode() == names[kind].format(i=i, label=LABELS[i])
        assert ("moments_flip" in record) == (kind != "edm2")
        if kind != "edm2":
            np.testing.assert_allclose(record["moments_flip"], moments(i, True).transpose(1, 2, 0), rtol=1e-6)
    mean, std = np.split(np.stack([moments(i) for i in range(NUM)]).astype(float), 2, axis=1)
    np.testing.assert_allclose(metadata["mean"], mean.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(metadata["std"], np.sqrt(mean.var((0, 2, 3)) + (std**2).mean((0, 2, 3))), rtol=1e-6)
    assert metadata["vae"] == "mine" and metadata["num_images"] == NUM and metadata["skipped"] == []
    assert metadata["latent_shape"] == [H, W, C] and metadata["flip"] == (kind != "edm2")
    assert metadata["source"]["path"] == str(source) and metadata["source"]["format"] == kind


@pytest.fixture(autouse=True)
def of_any_channels(monkeypatch):
    """Let the conventions of four channels serve for the three of these tests."""
    known = {name: c._replace(shift=c.shift[:3], scale=c.scale[:3]) for name, c in conventions.CONVENTIONS.items()}
    monkeypatch.setattr(conventions, "CONVENTIONS", known)


def test_conventions(write, tmp_path):
    for kind, name in (("lmdb", "imm"), ("pt", "sd"), ("edm2", "edm2")):
        source = write(kind)
        metadata = run(kind, source, tmp_path / kind)
        assert conventions.from_dict(metadata["convention"]) == conventions.CONVENTIONS[name]
    metadata = run("edm2", source, tmp_path / "other", "--convention", "imf")
    assert conventions.from_dict(metadata["convention"]) == conventions.CONVENTIONS["imf"]
    with pytest.raises(UserError, match="begun with other settings: .*convention"):
        run("edm2", source, tmp_path / "other")


@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_to_the_same_files(kind, write, tmp_path, monkeypatch):
    source = write(kind)
    run(kind, source, tmp_path / "whole" / "dest", "--shard_size", "2")
    read_one = importers._read
    for stop in (0, 3, 5):

        def dying(store, i, options, first=None, stop=stop):
            if first and i == stop:
                raise ZeroDivisionError
            return read_one(store, i, options, first)

        monkeypatch.setattr(importers, "_read", dying)
        with pytest.raises(ZeroDivisionError):
            run(kind, source, tmp_path / "part" / "dest", "--shard_size", "2")
    monkeypatch.setattr(importers, "_read", read_one)
    run(kind, source, tmp_path / "part" / "dest", "--shard_size", "2")
    assert digests(tmp_path / "part") == digests(tmp_path / "whole")


@pytest.mark.parametrize("to", [torch.tensor, lambda array: array.astype(np.float16), lambda array: array[None]])
def test_arrays_of_an_lmdb(to, tmp_path):
    run("lmdb", write_lmdb(tmp_path / "store", lmdb_records(to), pickle.dumps(NUM)), tmp_path / "dest")
    for i, record in enumerate(read(tmp_path / "dest")):
        np.testing.assert_allclose(record["moments"], moments(i).transpose(1, 2, 0), rtol=3e-3)


def test_log_variances_are_clipped(tmp_path):
    records = lmdb_records()
    records["0"]["moments"][C:] = 100
    records["1"]["moments"][C:] = -100
    run("lmdb", write_lmdb(tmp_path / "store", records), tmp_path / "dest")
    found = read(tmp_path / "dest")
    for i, limit in enumerate((20, -30)):
        np.testing.assert_array_equal(found[i]["moments"][..., C:], np.float32(np.exp(0.5 * limit)))


def test_an_lmdb_as_one_file(write, tmp_path):
    source = write("lmdb")
    run("lmdb", source / "data.mdb", tmp_path / "dest")
    assert len(read(tmp_path / "dest")) == NUM


@pytest.mark.parametrize("share", [0.99, 0.7, 0.3])
def test_an_lmdb_that_is_cut_off(share, write, tmp_path):
    file = write("lmdb") / "data.mdb"
    content = file.read_bytes()
    with lmdb.open(str(file.parent), readonly=True, lock=False) as environment:
        size = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    file.write_bytes(content[: int(size * share)])
    with pytest.raises(UserError, match=f"{file} is cut off at .* of {size} bytes: copy it again"):
        run("lmdb", file.parent, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


@pytest.mark.parametrize("content", [b"", b"text" * 3000])
def test_a_file_that_is_no_lmdb(content, tmp_path):
    (tmp_path / "data.mdb").write_bytes(content)
    with pytest.raises(UserError, match="cannot read .*data.mdb as an LMDB"):
        run("lmdb", tmp_path, tmp_path / "dest")
    with pytest.raises(UserError, match="nowhere is no LMDB: name the directory"):
        run("lmdb", tmp_path / "nowhere", tmp_path / "dest")


def test_an_lmdb_that_lacks_records(tmp_path):
    records = lmdb_records()
    del records["2"], records["5"]
    with pytest.raises(UserError, match="lacks 2 of its 7 records: 2, 5. "):
        run("lmdb", write_lmdb(tmp_path / "a", records), tmp_path / "dest")
    with pytest.raises(UserError, match="has no key num_samples"):
        run("lmdb", write_lmdb(tmp_path / "b", records, None), tmp_path / "dest")
    with pytest.raises(UserError, match="has 'seven' under num_samples"):
        run("lmdb", write_lmdb(tmp_path / "c", records, pickle.dumps("seven")), tmp_path / "dest")


def test_lmdb_is_optional(write, tmp_path, monkeypatch):
    source = write("lmdb")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match=r'pip install --constraint constraints.txt -e "\.\[latents\]"'):
        run("lmdb", source, tmp_path / "dest")


class Touch:
    """Makes a file as soon as it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.path}",)


def test_nothing_is_executed(tmp_path):
    mark = tmp_path / "executed"
    evil = {"moments": Touch(mark)}
    source = write_lmdb(tmp_path / "lmdb", lmdb_records() | {"3": pickle.dumps(evil)})
    with pytest.raises(UserError, match="record 3 of .*data.mdb is refused: it calls 'posix.system'"):
        run("lmdb", source, tmp_path / "a")
    source = write_lmdb(tmp_path / "number", lmdb_records(), pickle.dumps(Touch(mark)))
    with pytest.raises(UserError, match="num_samples of .*data.mdb is refused: it calls 'posix.system'"):
        run("lmdb", source, tmp_path / "a")
    torch.save(evil, write_pt(tmp_path / "pt") / "class1" / "3.pt")
    with pytest.raises(UserError, match=r"class1/3.pt is refused: it calls 'posix.system'"):
        run("pt", tmp_path / "pt", tmp_path / "b")
    np.save(write_edm2(tmp_path / "edm2") / "00000" / "img-3.npy", np.array([Touch(mark)], object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot read .*img-3.npy: .*allow_pickle=False"):
        run("edm2", tmp_path / "edm2", tmp_path / "c")
    assert not mark.exists()
    torch.load(tmp_path / "pt" / "class1" / "3.pt", weights_only=False)
    assert mark.exists()  # it would have been


@pytest.mark.parametrize(
    "to",
    [
        lambda array: array,
        lambda array: {"moments": array, "moments_flip": array.flip(2)},
        lambda array: {"image": array[None], "label": torch.tensor(5)},
        lambda array: {"image": array.permute(1, 2, 0).contiguous(), "label": 5},
        lambda array: {"moments": array.double()},
        lambda array: {"moments": array.bfloat16()},
    ],
    ids=["alone", "moments", "batch of one", "channels last", "float64", "bfloat16"],
)
def test_contents_of_a_pt(to, tmp_path):
    entry = to(torch.tensor(moments(0)))
    run("pt", write_pt(tmp_path / "pt", lambda i: to(torch.tensor(moments(i)))), tmp_path / "dest")
    for record in read(tmp_path / "dest"):
        label, i = int(record["name"][5:6]), int(record["name"][7:8])
        half = isinstance(entry, dict) and entry.get("moments", torch.zeros(0)).dtype == torch.bfloat16
        np.testing.assert_allclose(record["moments"], moments(i).transpose(1, 2, 0), rtol=1e-2 if half else 0)
        assert record["label"] == (5 if isinstance(entry, dict) and "label" in entry else label)
        assert ("moments_flip" in record) == (isinstance(entry, dict) and "moments_flip" in entry)


def test_pt_that_cannot_be(tmp_path):
    source = write_pt(tmp_path / "pt")
    path = source / "class0" / "2.pt"
    for entry, words in (
        ({"latent": 1}, "2.pt has no moments, but 'latent'"),
        (5, "2.pt has no moments, but int"),
        (
            {"image": np.zeros((2 * C, H, W))},
            "2.pt is refused: it calls 'numpy.*_reconstruct'.  Have its maker save plain",
        ),
        ({"image": "a"}, "2.pt is no floating array"),
        ({"image": torch.zeros(2 * C, H, W).long()}, "2.pt is no floating array"),
        ({"image": torch.zeros(2, 2 * C, H, W)}, r"2.pt is of shape \(2, 6, 4, 4\)"),
        (
            {"image": torch.zeros(4, 4, 4)},
            r"2.pt is of shape \(4, 4, 4\), of which the channels cannot be told: --layout",
        ),
        ({"image": torch.zeros(2 * C, 5, 5)}, r"2.pt has \{'moments': \(5, 5, 6\)\} .*, but class0/0.pt"),
        ({"image": torch.zeros(2 * C, H, W)}, "2.pt has .*, but class0/0.pt .*moments_flip"),
    ):
        torch.save(entry, path)
        with pytest.raises(UserError, match=words):
            run("pt", source, tmp_path / "dest")
    torch.save({"image": torch.zeros(2 * C, H, W)}, path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match="cannot read .*2.pt: "):
        run("pt", source, tmp_path / "dest")
    with pytest.raises(UserError, match="nowhere is no folder"):
        run("pt", tmp_path / "nowhere", tmp_path / "dest")


def test_pt_without_labels(tmp_path):
    for i in range(2):
        torch.save(torch.tensor(moments(i)), tmp_path / f"{i}.pt")
    with pytest.raises(UserError, match="0.pt has no label: --labels names a file"):
        run("pt", tmp_path, tmp_path / "dest")
    (tmp_path / "labels.json").write_text(json.dumps([["0.pt", 4], ["1.pt", 2]]))
    run("pt", tmp_path, tmp_path / "dest", "--labels", str(tmp_path / "labels.json"))
    assert [record["label"] for record in read(tmp_path / "dest")] == [4, 2]


def test_labels_of_a_file(write, tmp_path):
    file = tmp_path / "labels.json"
    file.write_text(json.dumps({str(i): 10 + i for i in range(NUM)}))
    run("lmdb", write("lmdb"), tmp_path / "a", "--labels", str(file))
    assert [record["label"] for record in read(tmp_path / "a")] == [10 + i for i in range(NUM)]
    file.write_text(json.dumps({f"00000/img-{i}.npy": 20 + i for i in (3, 1)}))
    source = write("edm2")
    (source / "dataset.json").unlink()
    run("edm2", source, tmp_path / "b", "--labels", str(file))
    assert [record["label"] for record in read(tmp_path / "b")] == [23, 21]


@pytest.mark.parametrize("label", [-1, 1.5, "cat", None, np.array([1, 2])])
def test_labels_that_cannot_be(label, tmp_path):
    records = lmdb_records()
    records["4"]["label"] = label
    with pytest.raises(UserError, match="4 has (the label|no label).*: --labels names a file"):
        run("lmdb", write_lmdb(tmp_path / "a", records), tmp_path / "dest")


def test_a_zip_is_its_folder(write, tmp_path):
    source = write("edm2")
    (tmp_path / "one").mkdir()
    with zipfile.ZipFile(tmp_path / "one" / "edm2_store", "w", zipfile.ZIP_DEFLATED) as file:
        for part in source.rglob("*"):
            file.write(part, part.relative_to(source))
    run("edm2", source, tmp_path / "a")
    run("edm2", tmp_path / "one" / "edm2_store", tmp_path / "b")
    a, b = digests(tmp_path / "a"), digests(tmp_path / "b")
    assert a.pop("metadata.json") != b.pop("metadata.json")  # only the path of the source
    assert a == b


def test_edm2_of_unlabelled_images(tmp_path):
    run("edm2", write_edm2(tmp_path / "edm2", {"labels": None}), tmp_path / "dest")
    records = read(tmp_path / "dest")
    assert len(records) == 7 and {record["label"] for record in records} == {0}


def test_edm2_with_files_that_have_no_label(write, tmp_path, monkeypatch):
    warnings, source = [], write("edm2")
    monkeypatch.setattr(formats.logging, "warning", lambda text, *values: warnings.append(text % values))
    run("edm2", source, tmp_path / "all")
    assert not warnings
    np.save(source / "00000" / "more.npy", moments(0))
    run("edm2", source, tmp_path / "some")
    assert len(read(tmp_path / "some")) == NUM
    assert warnings == [f"{source}: 1 .npy files have no label and are left out, 00000/more.npy for one"]


@pytest.mark.parametrize("index", [{}, {"labels": []}])
def test_edm2_without_labels(index, tmp_path):
    with pytest.raises(UserError, match="dataset.json holds no labels"):
        run("edm2", write_edm2(tmp_path / "edm2", index), tmp_path / "dest")


def test_edm2_that_is_not_whole(write, tmp_path):
    source = write("edm2")
    path = source / "00000" / "img-2.npy"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot read .*00000/img-2.npy: "):
        run("edm2", source, tmp_path / "dest")
    path.unlink()
    with pytest.raises(UserError, match="cannot read .*00000/img-2.npy: .*copy all files"):
        run("edm2", source, tmp_path / "dest")
    (source / "dataset.json").unlink()
    with pytest.raises(UserError, match="cannot read the labels of .*dataset.json"):
        run("edm2", source, tmp_path / "dest")


def test_moments_that_cannot_be(write, tmp_path):
    source = write("edm2")
    path = source / "00000" / "img-2.npy"
    bad = moments(2)
    bad[1, 2, 3] = np.nan
    for array, words in (
        (bad, "img-2.npy are not finite"),
        (with_log(moments(2)), "img-2.npy have a standard deviation below 0.*--moments mean_logvar"),
        (moments(2)[:5], "img-2.npy has 5 channels, and moments an even number"),
    ):
        np.save(path, array)
        with pytest.raises(UserError, match=words):
            run("edm2", source, tmp_path / "dest")


def test_other_kinds_of_moments(tmp_path):
    source = write_edm2(tmp_path / "edm2")
    for i in range(NUM):
        np.save(source / "00000" / f"img-{i}.npy", with_log(moments(i)).transpose(1, 2, 0))
    run("edm2", source, tmp_path / "dest", "--moments", "mean_logvar", "--layout", "hwc")
    for i, record in enumerate(read(tmp_path / "dest")):
        np.testing.assert_allclose(record["moments"], moments(i).transpose(1, 2, 0), rtol=1e-6)


def test_mirrored_moments_of_another_shape(tmp_path):
    records = lmdb_records()
    records["0"]["moments_flip"] = np.zeros((2 * C, 5, 5), np.float32)
    with pytest.raises(UserError, match="0 has moments of shape .*both must be alike"):
        run("lmdb", write_lmdb(tmp_path / "a", records), tmp_path / "dest")


def test_options(write, tmp_path):
    with pytest.raises(UserError, match="--shard_size is 0"):
        run("edm2", write("edm2"), tmp_path / "dest", "--shard_size", "0")
    assert set(importers.FORMATS) == set(KINDS)
    assert formats.open_lmdb is importers.FORMATS["lmdb"].open


def test_the_command(write, tmp_path):
    source = write("edm2")
    shutil.rmtree(source / "00000")
    argv = [sys.executable, "-m", "meanflow.commands.import_latents", "edm2", source, tmp_path / "dest"]
    command = subprocess.run(argv, capture_output=True, text=True)
    assert command.returncode == 2 and command.stderr.splitlines()[-1].startswith("error: cannot read ")


def test_names_of_the_folders_of_pt(tmp_path):
    """Numbers by value; labels within the files have no names."""
    source = write_pt(tmp_path / "pt")
    for old, new in zip(sorted(path.name for path in source.iterdir()), ("10", "9"), strict=True):
        (source / old).rename(source / new)
    run("pt", source, tmp_path / "a")
    assert dataset.read_metadata(str(tmp_path / "a"))["classes"] == ["9", "10"]
    assert {record["name"].decode().split("/")[0]: record["label"] for record in read(tmp_path / "a")} == {
        "9": 0, "10": 1,
    }  # fmt: skip
    labelled = write_pt(tmp_path / "labelled", lambda i: {"moments": torch.tensor(moments(i)), "label": i})
    run("pt", labelled, tmp_path / "b")
    assert "classes" not in dataset.read_metadata(str(tmp_path / "b"))
