"""Digests of what paths hold: where it is does not count, every change of it does."""

import shutil

import numpy as np
import pytest

from configs import digits
from meanflow.data import couplings, digests


def write(directory, change=None):
    """Write 20 couplings in shards of 8; of pair `change`, one value is another."""

    def coupler(noise, labels):
        images = np.tanh(noise)
        if change is not None:
            images[change % 4, 0, 0, 0] += 1e-3 * (coupler.calls == change // 4)
        coupler.calls += 1
        return images

    coupler.calls = 0
    plan = couplings.Plan((4, 4, 1), 20, 3, 0, shard_size=8, batch_size=4)
    assert not couplings.make(directory, plan, coupler, {})
    return str(directory)


def test_the_same_data_elsewhere(tmp_path):
    one = digests.of_dataset(write(tmp_path / "one"), "train", "")
    shutil.move(tmp_path / "one", tmp_path / "two[2]")
    assert digests.of_dataset(str(tmp_path / "two[2]"), "train", "") == one
    assert digests.of_dataset(write(tmp_path / "three"), "train", "") == one


@pytest.mark.parametrize("change", [0, 7, 19])
def test_one_value_of_one_record_counts(tmp_path, change):
    one, other = write(tmp_path / "one"), write(tmp_path / "other", change)
    assert digests.of_dataset(one, "train", "") != digests.of_dataset(other, "train", "")


def test_splits_and_directories(datasets_dir, tmp_path):
    shutil.copytree(f"{datasets_dir}/digits", tmp_path / "moved" / "digits")
    of = [
        digests.of_dataset("digits", split, str(directory))
        for split, directory in [("train", datasets_dir), ("train", tmp_path / "moved"), ("test", datasets_dir)]
    ]
    assert of[0] == of[1] != of[2]
    assert digests.of_dataset("digits", "train[:90%]", datasets_dir) not in of


def test_files_and_names_on_a_hub(tmp_path):
    for name, text in [("a/x/config.json", "1"), ("b/x/config.json", "1"), ("c/x/config.json", "2"), ("d/y", "1")]:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    of = {name: digests.of_path(str(tmp_path / name)) for name in "abcd"}
    assert of["a"] == of["b"] and len(set(of.values())) == 3
    assert digests.of_path("facebook/dinov2-base") == "facebook/dinov2-base"


def test_what_a_run_depends_on(datasets_dir, tmp_path):
    config = digits.get_config("flow")
    config.data.dir = datasets_dir
    assert digests.of_config(config).keys() == {"data.name"}
    config.data.encoder = str(tmp_path)
    weights = {"a": np.zeros(2)}
    assert digests.of_config(config, weights).keys() == {"data.name", "data.encoder", "method.teacher"}
    assert digests.of_config(config, weights)["method.teacher"] == digests.of_weights(weights)
