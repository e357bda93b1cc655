"""Which folders are classes, in which order, and what is refused because it is something else."""

import pytest

from meanflow.data.images import classes
from meanflow.errors import UserError


def labels(*names, more=()):
    tops = {name.split("/")[0] for name in names if "/" in name}
    return classes.labels_by_folder(names, tops | set(more), "data")


def test_words_are_in_the_order_of_text():
    """As torchvision's ImageFolder has them."""
    assert labels("b/1.png", "B/1.png", "a10/1.png", "a2/1.png") == ([3, 0, 1, 2], ["B", "a10", "a2", "b"])


def test_numbers_within_words_are_told(caplog):
    assert labels("class_10/1", "class_1/1", "class_2/1")[0] == [1, 0, 2]
    assert "in the order of their text, class_10 before class_2; zeros in front give another" in caplog.text
    caplog.clear()
    labels("class_01/1", "class_02/1", "class_10/1", "A3/1")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_numbers_are_their_labels(caplog):
    found, names = labels(*(f"{i}/1.png" for i in range(12)))
    assert found == list(range(12)) and names == [str(i) for i in range(12)]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_other_numbers_are_counted(caplog):
    assert labels("12/a.png", "3/a.png", "007/a.png") == ([2, 0, 1], ["3", "007", "12"])
    assert "the class folders are 3 numbers from 3 to 12.  Labels count them from 0 on: label 0 is 3" in caplog.text


def test_the_labels_are_logged(caplog):
    caplog.set_level("INFO")
    labels(*(f"{name}/1.png" for name in "gfedcba"))
    assert "data: label 0 is a, 1 is b, 2 is c, 3 is d, 4 is e, ..." in caplog.text


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (("1", "01", "2"), "data has class folders 01 and 1, the same number"),
        (("0", "-1", "1"), "data has a class folder -1: rename it"),
        (("0", "+1"), r"data has a class folder \+1: rename it"),
        (("2", "10", "other"), "data has class folders other and 2 to 10: the order .* is not clear"),
    ],
)
def test_numbers_in_no_clear_order(folders, words):
    with pytest.raises(UserError, match=words):
        labels(*(f"{name}/1.png" for name in folders))


def test_numbers_among_words_whose_order_is_clear():
    assert labels("747/1.png", "A320/1.png", "737/1.png")[1] == ["737", "747", "A320"]


SPLITS = {
    "train, val": "train/cat/1 train/dog/1 val/cat/1 val/dog/1",
    "other letters": "Training/cat/1 Training/dog/1 Test/cat/1",
    "one with other things": "train/cat/1 train/dog/1 samples/1",
    "one class": "train/cat/1 samples/1",
    "without classes": "test/1 train/2",
    "years": "train2017/1 val2017/2",
    "names around": "ILSVRC2012_img_train/n01/1 ILSVRC2012_img_val/n01/1",
    "Tiny ImageNet": "test/images/1 train/n01/images/1 train/n02/images/1 val/images/1",
    "two domains": "testA/1 testB/1 trainA/1 trainB/1",
    "a name before": "seg_test/seg_test/a/1 seg_test/seg_test/b/1 seg_train/seg_train/a/1 seg_train/seg_train/b/1",
    "capitals": "TRAIN/cat/1 TEST_SET/cat/1",
    "images": "images/cat/1 images/dog/1 thumbnails/1",
    "parts": "part1/cat/1 part1/dog/1 part2/cat/1 part2/dog/1",
    "folds": "a/cat/1 a/dog/1 b/cat/1 b/dog/1 c/bird/1 c/cat/1 c/dog/1",
    "masks": "images/cat/1 images/dog/1 masks/cat/1 masks/dog/1",
    "below one folder": "imagenet/train/cat/1 imagenet/train/dog/1 imagenet/val/cat/1",
}
FIRST = {
    "two domains": "trainA", "a name before": "seg_train", "capitals": "TRAIN",
    "other letters": "Training", "years": "train2017", "names around": "ILSVRC2012_img_train", "images": "images",
    "parts": "part1", "folds": "a", "masks": "images", "below one folder": "imagenet/train",
}  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_parts_of_the_data_are_no_classes(name):
    first = FIRST.get(name, "train")
    with pytest.raises(UserError, match=f"looks like a part of the data, .*Give data/{first}, or a zip of what is in"):
        labels(*SPLITS[name].split())


def test_folders_of_edm_are_no_classes():
    names = [f"{i // 1000:05}/img{i:08}.png" for i in (0, 999, 1000, 2500)]
    with pytest.raises(UserError, match="data holds files as EDM numbers them, .*: add its dataset.json, or one of"):
        labels(*names)
    assert labels(*names, "00003/other.png")[1] == ["00000", "00001", "00002", "00003"]
    assert labels(*names[:2])[0] == [0, 0]


def test_an_empty_split_is_one():
    with pytest.raises(UserError, match="all images of data are in its folder train, in 2 folders there"):
        labels("train/cat/1", "train/dog/1", more=["val"])


@pytest.mark.parametrize("names", ["a/b/cat/1 a/b/dog/1", "a/b/cat/1 a/b/dog/x/1 a/b/dog/2"])
def test_classes_below_several_folders(names):
    with pytest.raises(UserError, match="all images of data are in its folder a/b, in 2 folders there: .*Name that"):
        labels(*names.split())


@pytest.mark.parametrize(
    "names",
    [
        "bus/1 train/1 tram/1",
        "bus/1 train/1 train/steam/1",
        "n01/images/1 n02/images/1 n03/images/1",
        "cat/images/1 train/images/1",
        "bullet_train/1 freight_train/1",
        "trainA/1 trainB/1",
        "trainee/1 validator/1",
        "cat/a/1 cat/b/1 dog/b/1 dog/c/1",
        "cat/train/1 cat/val/1 dog/train/1 dog/val/1",
        "data/1 images/2",
        "a/b/c/1 a/b/c/2",
        "test/1",
        " ".join(f"person{i}/left/1 person{i}/right/1" for i in range(40)),
    ],
)
def test_classes_that_stay_classes(names):
    names = names.split()
    found, of_labels = labels(*names)
    assert of_labels == sorted({name.split("/")[0] for name in names})
    assert [of_labels[label] for label in found] == [name.split("/")[0] for name in names]
