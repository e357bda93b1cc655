"""Couplings: the same pairs however the work is divided, and those of the official layout."""

import json

import numpy as np
import pytest

from meanflow.commands import import_couplings
from meanflow.config.features import Feature
from meanflow.data import couplings, sources
from meanflow.errors import UserError
from meanflow.sampling import noise

SHAPE = (4, 4, 2)
PLAN = couplings.Plan(SHAPE, num_samples=23, num_classes=5, seed=1, shard_size=10, batch_size=4)
NOISE = Feature("noise", SHAPE, np.floating, "")


def coupler(e, y):
    """Return images of which each tells its noise and label; batches are always full."""
    assert e.shape == (PLAN.batch_size, *SHAPE) and y.shape == (PLAN.batch_size,)
    return e * e + y.reshape(-1, 1, 1, 1)


def make(directory, plan=PLAN, coupler=coupler, settings=(), **where):
    return couplings.make(directory, plan, coupler, {"teacher": "t", **dict(settings)}, {"note": 1}, **where)


def read(directory):
    source = sources.open_source(str(directory), "train", "", NOISE)
    return [source[i] for i in range(len(source))]


def shards(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if "array_record" in path.name}


def test_pairs(tmp_path):
    assert make(tmp_path) == []
    expected, labels, _ = noise.draw(np.arange(23), SHAPE, 5, 1)
    found = read(tmp_path)
    assert [pair["label"] for pair in found] == labels.tolist() and len(set(labels)) == 5
    for pair, e in zip(found, expected, strict=True):
        assert pair["image"].dtype == pair["noise"].dtype == np.float32
        np.testing.assert_array_equal(pair["noise"], e)
        np.testing.assert_array_equal(pair["image"], e * e + np.float32(pair["label"]))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_processes_make_the_files_of_one(order, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    make(one)
    missing = [make(two, process=process, num_processes=2) for process in order]
    assert missing == [[1] if order == (0, 1) else [0, 2], []]
    assert shards(two) == shards(one) and len(shards(one)) == 3


def test_labels_of_a_dataset_in_turn(tmp_path):
    make(tmp_path, PLAN._replace(labels=(4, 0, 3)))
    assert [pair["label"] for pair in read(tmp_path)] == [(4, 0, 3)[i % 3] for i in range(23)]


def test_pairs_that_are_far_apart_are_left_out(tmp_path):
    """Those whose distance is the limit, too."""
    make(tmp_path / "all")
    pairs = read(tmp_path / "all")
    distances = [float(np.square(pair["noise"] - pair["image"]).mean((0, 1, 2), np.float64)) for pair in pairs]
    limit = sorted(distances)[9]
    make(tmp_path / "near", PLAN._replace(distance_clip=limit))
    near = read(tmp_path / "near")
    expected = [pair for pair, distance in zip(pairs, distances, strict=True) if distance < limit]
    assert len(near) == len(expected) == 9
    for a, b in zip(near, expected, strict=True):
        np.testing.assert_array_equal(a["noise"], b["noise"])


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        ({"seed": 2}, {}, r"seed \(1 there, 2 here\)"),
        ({"num_samples": 24}, {}, r"num_samples \(23 there, 24 here\)"),
        ({"distance_clip": 0.5}, {}, r"distance_clip \(0.0 there, 0.5 here\)"),
        ({}, {"teacher": "other"}, r"teacher \('t' there, 'other' here\)"),
    ],
)
def test_other_settings(change, settings, words, tmp_path):
    make(tmp_path)
    with pytest.raises(UserError, match=words):
        make(tmp_path, PLAN._replace(**change), settings=settings)
    assert make(tmp_path, PLAN._replace(batch_size=3)) == []  # it only rounds differently


def test_what_a_teacher_cannot_make(tmp_path):
    with pytest.raises(UserError, match=r"labels 0 to 5 are not in \[0, 5\), the teacher's"):
        make(tmp_path / "labels", PLAN._replace(labels=(0, 5)))
    with pytest.raises(UserError, match="images of the noises 0 to 3 are not finite"):
        make(tmp_path / "nan", coupler=lambda e, y: e * np.nan)


@pytest.fixture
def folder(tmp_path):
    """Return a folder with three couplings in the official layout, images [c h w]."""
    folder = tmp_path / "official"
    (folder / "00000").mkdir(parents=True)
    names = ["0", "1", "00000/img7"]
    for i, name in enumerate(names):
        image = np.random.default_rng(i).normal(size=(2, 4, 6)).astype(np.float16 if i == 1 else np.float32)
        np.save(folder / f"{name}.npy", image)
        np.save(folder / f"{name}_noise.npy", -2 * image)
    write_index(folder, {"labels": [[f"{name}.npy", 3 * i] for i, name in enumerate(names)]})
    return folder


def write_index(folder, content):
    (folder / "dataset.json").write_text(json.dumps(content))


def run(folder, *flags):
    import_couplings.main([str(folder), str(folder.parent / "dest"), *flags])
    source = sources.open_source(str(folder.parent / "dest"), "train", "", NOISE._replace(shape=(4, 6, 2)))
    return [source[i] for i in range(len(source))]


def test_import(folder, capsys):
    found = run(folder, "--shard_size=2")
    assert capsys.readouterr().out == f"{folder.parent / 'dest'}: 3 pairs\n"
    assert [pair["label"] for pair in found] == [0, 3, 6]
    for i, (name, pair) in enumerate(zip(["0", "1", "00000/img7"], found, strict=True)):
        image = np.load(folder / f"{name}.npy").transpose(1, 2, 0)
        np.testing.assert_array_equal(pair["image"], image.astype(np.float32))
        np.testing.assert_array_equal(pair["noise"], -2 * pair["image"])
        assert pair["image"].shape == (4, 6, 2) and pair["image"].dtype == pair["noise"].dtype == np.float32, i
    assert len(run(folder, "--shard_size=2")) == 3  # again: nothing is left to do


@pytest.mark.parametrize(
    "content",
    [{"0": 5, "1.npy": 2}, [["0", 5], [1, 2]], {"labels": {"0.npy": 5, "1": 2}}, {"labels": [[0, 5], ["1", 2]]}],
)
def test_forms_of_the_index(content, folder):
    (folder / "dataset.json").unlink()
    (folder / "other.json").write_text(json.dumps(content))
    assert [pair["label"] for pair in run(folder, f"--labels={folder / 'other.json'}")] == [5, 2]


def official(folder, root):
    """Give the folder Re-MeanFlow's index, of two couplings."""
    write_index(folder, {"root": root, "file_list": ["1.npy", "0.npy"], "label_list": [5, 2]})


@pytest.mark.parametrize("place", [".", "samples", "elsewhere"])
def test_the_official_index(place, folder, tmp_path):
    """Its root is a path of the machine that made it; the arrays are in SOURCE, in SOURCE/samples, or still there."""
    root = tmp_path / "samples" if place == "elsewhere" else "machine/512/reflow/samples"
    official(folder, str(root))
    if place != ".":
        (new := root if place == "elsewhere" else folder / place).mkdir()
        for path in folder.glob("*.npy"):
            path.rename(new / path.name)
    found = run(folder)
    assert [pair["label"] for pair in found] == [5, 2]
    first = np.load(next(tmp_path.rglob("1_noise.npy"))).transpose(1, 2, 0)
    np.testing.assert_array_equal(found[0]["noise"], first.astype(np.float32))


def test_an_official_index_without_its_arrays(folder):
    official(folder, "machine/samples")
    (folder / "1.npy").unlink()
    with pytest.raises(UserError, match="cannot read .*official/1.npy"):
        run(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"root": "a", "file_list": ["0.npy"], "label_list": [1, 2]}, "as many names in .*, and has 1 and 2"),
        ({"root": "a", "file_list": "0.npy", "label_list": [1]}, "has no list and 1"),
        ({"root": "a", "file_list": [], "label_list": []}, "dataset.json holds no labels"),
        ({"root": "a", "file_list": ["0.npy"], "label_list": [1.5]}, r'has the entry \["0.npy", 1.5\]'),
        ({"labels": None}, "dataset.json holds no labels: it must be"),
        ([], "dataset.json holds no labels"),
        ("0", "dataset.json holds no labels"),
        ([["0", 1.0]], r'has the entry \["0", 1.0\], which is no name and label'),
        ([["0", True]], r'has the entry \["0", true\]'),
        ([["0", -1]], r'has the entry \["0", -1\]'),
        ([["0", 1, 2]], r'has the entry \["0", 1, 2\]'),
        ([0, 1], "has the entry 0,"),
        ({"0": [0, 1]}, r'has the entry \["0", \[0, 1\]\]'),
        ([["0", 1], ["0.npy", 1]], "names 0 twice"),
        ([["2", 1]], "cannot read .*official/2.npy"),
    ],
)
def test_an_index_of_another_form(content, words, folder):
    write_index(folder, content)
    with pytest.raises(UserError, match=words):
        run(folder)


def test_no_index(folder):
    (folder / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the labels of .*dataset.json: .*--labels"):
        run(folder)
    (folder / "dataset.json").unlink()
    with pytest.raises(UserError, match="cannot read the labels of .*dataset.json: .*--labels"):
        run(folder)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 4, 5), np.float32), r"1_noise.npy is of shape \(4, 5, 2\) .* but the first image of \(4, 6, 2\)"),
        (np.zeros((4, 6), np.float32), "1_noise.npy holds no floating array"),
        (np.zeros((2, 4, 6), np.uint8), "1_noise.npy holds no floating array"),
        (np.full((2, 4, 6), np.nan, np.float32), "1_noise.npy has values that are not finite"),
        (np.array([{}]), "cannot read .*1_noise.npy: .*allow_pickle=False"),
        (None, "cannot read .*1_noise.npy: .*No such file"),
    ],
)
def test_a_file_that_does_not_fit(array, words, folder):
    (folder / "1_noise.npy").unlink()
    if array is not None:
        np.save(folder / "1_noise.npy", array)
    with pytest.raises(UserError, match=words):
        run(folder)


def test_a_file_that_is_cut_short(folder):
    whole = (folder / "1.npy").read_bytes()
    for part in (whole[:-7], b"", whole[: len(whole) // 2]):
        (folder / "1.npy").write_bytes(part)
        with pytest.raises(UserError, match="cannot read .*1.npy"):
            run(folder)
    (folder / "1.npy").write_bytes(whole)
    assert len(run(folder)) == 3


def test_shards_of_no_size(folder):
    with pytest.raises(UserError, match="--shard_size is 0"):
        run(folder, "--shard_size=0")
