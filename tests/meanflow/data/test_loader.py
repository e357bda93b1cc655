"""The order of the data is one function of the seed; each record fits the model or is named."""

import collections
import copy
import itertools
import json
import multiprocessing
import os
import signal
import sys

import grain
import loader_process
import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from configs import digits
from meanflow import signals
from meanflow.config import features, options
from meanflow.data import augment, couplings, digests, examples, loader, record_reader, records, sources
from meanflow.data.latents import dataset
from meanflow.errors import UserError

NUM = 1397
BATCH = 256
STEPS = 8  # more than one epoch
NUMBERS = {"image": record_reader.Feature("array", (8, 8, 1)), "label": record_reader.Feature("integer")}


class FeaturedPatches(tfds.core.GeneratorBasedBuilder):
    """Grey images with features of two encoders; image i is filled with i, but for a last column of 255."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = epath.Path(__file__).parent  # TFDS looks it up by itself only for a module inside a package

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(8, 8, 1)), "label": tfds.features.ClassLabel(num_classes=10),
            "features": tfds.features.Tensor(shape=(16, 5), dtype=np.float16, encoding="bytes"),
        }  # fmt: skip
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(40):
            image = np.full((8, 8, 1), i, np.uint8)
            image[:, -1] = 255
            yield i, {"image": image, "label": i % 10, "features": features_of(i)}


def features_of(i):
    return np.random.default_rng(i).normal(size=(16, 5)).astype(np.float16)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """Return a dataset of as many images as the digits, which need no decoding, and are read in a tenth of the time."""
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(NUM, 8, 8, 1)).astype(np.float32), rng.integers(10, size=NUM)
    layout = records.Layout(tmp_path_factory.mktemp("numbers"), "numbers", NUMBERS, 1)
    records.begin(layout, {})
    records.write(layout, lambda _: ({"image": a, "label": y} for a, y in zip(images, labels, strict=True)))
    return str(layout.directory)


@pytest.fixture
def config(numbers, datasets_dir):
    config = digits.get_config()
    config.data.update(name=numbers, dir=datasets_dir)
    return config


@pytest.fixture
def augmented(config):
    """Return a config with a few transforms of each kind, each half of the time, after the flips."""
    config.data.flip = True
    config.data.augment.update(dict.fromkeys(augment.NUM_LABELS, 0.0))
    config.data.augment.update(prob=0.5, rotate_int=1.0, scale=0.5, brightness=1.0)
    return config


@pytest.fixture
def featured(config):
    """Return a config whose dataset has features in addition to the images."""
    config = options.recompose(config, "dit", "flow")
    config.data.update(name="featured_patches", flip=True)
    config.model.repa_dims = (2, 3)
    return config


@pytest.fixture
def coupled(config, tmp_path):
    """Return a config that learns from couplings: images that are twice their noise."""
    plan = couplings.Plan((8, 8, 1), num_samples=40, num_classes=10, seed=1, shard_size=16)
    couplings.make(tmp_path / "couplings", plan, lambda noise, y: 2 * noise, {})
    config = options.recompose(config, "dit", "rectified")
    config.data.update(name=str(tmp_path / "couplings"), flip=True)
    return config


@pytest.fixture
def latents(config, tmp_path):
    """Return a config that learns from latents."""
    facts = {"convention": {"shift": [0.0], "scale": [1.0], "pixels": "symmetric"}, "latent_shape": (8, 8, 1)}

    def of_shard(indices, _):
        for i in indices:
            yield {"moments": np.full((8, 8, 2), i, np.float32), "label": i % 10, "name": str(i)}

    dataset.write(
        dataset.Job(tmp_path / "latents", dataset.features((8, 8, 1), False), [range(40)], {}, facts), of_shard
    )
    config = copy.deepcopy(config)
    config.data.name = str(tmp_path / "latents")
    return config


def take(batches, num):
    return list(itertools.islice(batches, num))


def rows(batches):
    return np.concatenate([batch["image"] for batch in batches]), np.concatenate([batch["label"] for batch in batches])


def assert_same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def count(images, labels):
    return collections.Counter((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


def test_batch(config):
    config.data.name = "digits"
    batch = next(loader.make_loader(config, BATCH))
    assert set(batch) == {"image", "label"}
    assert batch["image"].shape == (BATCH, 8, 8, 1)
    assert batch["image"].dtype == np.float32
    assert batch["image"].min() == -1
    assert batch["image"].max() == 1
    assert batch["label"].shape == (BATCH,)
    assert batch["label"].dtype == np.int32


def test_an_epoch_has_each_example_once_and_the_next_another_order(config):
    config.data.flip = False
    images, labels = rows(take(loader.make_loader(config, NUM), 2))
    everything = count(*loader.load_arrays(config, "train"))
    assert count(images[:NUM], labels[:NUM]) == everything
    assert count(images[NUM:], labels[NUM:]) == everything
    assert np.any(labels[:NUM] != labels[NUM:])


def test_batches_run_across_the_end_of_an_epoch(config):
    """1397 is no multiple of 256, so dropping the remainder would lose examples."""
    images, labels = rows(take(loader.make_loader(config, BATCH), STEPS))
    assert count(images[:NUM], labels[:NUM]) == count(*loader.load_arrays(config, "train"))


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_share_the_batch_of_one(config, num_processes):
    config.data.flip = True
    whole = take(loader.make_loader(config, BATCH), STEPS)
    parts = [take(loader.make_loader(config, BATCH, p, num_processes), STEPS) for p in range(num_processes)]
    joined = [dict(zip(("image", "label"), rows(step), strict=True)) for step in zip(*parts, strict=True)]
    assert_same(joined, whole)


def test_augmented_batch(augmented):
    batch = next(loader.make_loader(augmented, BATCH))
    assert set(batch) == {"image", "label", "augment"}
    assert batch["image"].shape == (BATCH, 8, 8, 1)
    assert batch["augment"].shape == (BATCH, 4)
    assert batch["image"].dtype == batch["augment"].dtype == np.float32
    np.testing.assert_allclose((batch["augment"] != 0).mean(axis=0), [0.25, 0.25, 0.25, 0.5], atol=0.1)


def test_augmentation_comes_after_the_same_flips(config):
    config.data.flip = True
    plain = take(loader.make_loader(config, BATCH), 2)
    config.data.augment.update(dict.fromkeys(augment.NUM_LABELS, 0.0) | {"prob": 1.0, "yflip": 1.0})
    for one, other in zip(take(loader.make_loader(config, BATCH), 2), plain, strict=True):
        turned = one["augment"][:, 0] == 1
        assert 0.35 < turned.mean() < 0.65
        np.testing.assert_array_equal(one["image"][turned], other["image"][turned, ::-1])
        np.testing.assert_array_equal(one["image"][~turned], other["image"][~turned])
        np.testing.assert_array_equal(one["label"], other["label"])


def test_augmentation_is_drawn_anew_in_each_epoch_and_from_the_seed(augmented):
    augmented.data.augment.update(prob=1.0, rotate_int=0.0, scale=0.0)
    first, second = (batch["augment"] for batch in take(loader.make_loader(augmented, NUM), 2))
    assert len(np.unique(np.concatenate([first, second]))) > 2700
    augmented.seed = 1
    assert np.any(next(loader.make_loader(augmented, BATCH))["augment"] != first[:BATCH])


def test_processes_share_the_augmented_batch_of_one(augmented):
    whole = take(loader.make_loader(augmented, 64), 2)
    parts = [take(loader.make_loader(augmented, 64, p, 2), 2) for p in range(2)]
    joined = [
        {key: np.concatenate([half[key] for half in halves]) for key in halves[0]}
        for halves in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_whole_splits_are_not_augmented(augmented):
    images, labels = loader.load_arrays(augmented, "train")
    augmented.data.augment.prob, augmented.data.flip = 0.0, False
    assert_same(
        [dict(zip(("image", "label"), loader.load_arrays(augmented, "train"), strict=True))],
        [{"image": images, "label": labels}],
    )


def test_stored_features_follow_their_images(featured):
    """Mirrored ones too: then the columns of the grid of tokens change places, not its rows."""
    mirrored = []
    for batch in take(loader.make_loader(featured, 20), 4):
        assert set(batch) == {"image", "label", "features"}
        assert batch["features"].shape == (20, 16, 5)
        assert batch["features"].dtype == np.float32
        for image, tokens in zip(batch["image"], batch["features"], strict=True):
            mirrored.append(image[0, 0, 0] == 1)
            stored = features_of(round(127.5 * (image[0, 4, 0] + 1))).reshape(4, 4, 5)
            np.testing.assert_array_equal(tokens.reshape(4, 4, 5), stored[:, ::-1] if mirrored[-1] else stored)
    assert 20 < sum(mirrored) < 60


def test_processes_share_the_features_of_one(featured):
    whole = take(loader.make_loader(featured, 16), 4)
    parts = [take(loader.make_loader(featured, 16, p, 2), 4) for p in range(2)]
    joined = [{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*parts, strict=True)]
    assert_same(joined, whole)


def test_resumes_with_features(featured):
    batches = loader.make_loader(featured, 16)
    take(batches, 2)
    state = batches.get_state()
    expected = take(batches, 2)
    resumed = loader.make_loader(featured, 16)
    resumed.set_state(state)
    assert_same(take(resumed, 2), expected)


def test_noise_is_mirrored_with_its_image(coupled):
    everything = loader.load_arrays(coupled, "train")[0]
    stored = {image.tobytes() for image in everything}
    num_stored = 0
    for batch in take(loader.make_loader(coupled, 20), 4):
        assert set(batch) == {"image", "noise", "label"}
        assert batch["noise"].shape == (20, 8, 8, 1) and batch["noise"].dtype == np.float32
        np.testing.assert_array_equal(batch["image"], 2 * batch["noise"])
        num_stored += sum(image.tobytes() in stored for image in batch["image"])
    assert len(stored) == 40 and 20 < num_stored < 60


def test_processes_share_the_noise_of_one(coupled):
    whole = take(loader.make_loader(coupled, 16), 4)
    parts = [take(loader.make_loader(coupled, 16, p, 2), 4) for p in range(2)]
    joined = [{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*parts, strict=True)]
    assert_same(joined, whole)


def test_loader_processes(coupled, latents):
    """They import neither TensorFlow nor what only a trainer needs, end with it, and raise the errors of a user."""
    loaders = [loader.make_loader(config, 16) for config in (coupled, latents)]
    latents.model.num_classes = 4  # of ten
    loaders.append(loader.make_loader(latents, 16))
    mixed = grain.MapDataset.mix([batches._batches for batches in loaders])
    batches = loader.Loader(mixed.map(loader_process.describe), {}, 1)
    for batch, names in zip(take(batches, 2), (("image", "noise"), ("image",)), strict=True):
        assert batch.keys() == {*names, "label", "modules", "watched"}
        assert not [name for name, there in zip(loader_process.MODULES, batch["modules"], strict=True) if there]
        assert batch["watched"]
    with pytest.raises(UserError, match=r"record \d+ of .*latents .* label [4-9].*--config.model.num_classes"):
        next(batches)
    batches.close()


@pytest.mark.parametrize("data", ["coupled", "latents"])
def test_our_own_datasets_need_no_tfds(data, request, monkeypatch):
    config = request.getfixturevalue(data)
    for name in ("tensorflow", "tensorflow_datasets", "meanflow.data.images.tfds_images"):
        monkeypatch.setitem(sys.modules, name, None)  # which cannot be imported then
    assert len(next(loader.make_loader(config, 16))["image"]) == 16
    assert len(loader.load_arrays(config, "train")[0]) == 40
    assert digests.of_dataset(config.data.name, "train", "")
    assert sources.split_names(config.data.name, "") == ("train",)


def test_only_couplings_have_noise(coupled):
    flow = options.recompose(coupled, "dit", "flow")
    assert set(next(loader.make_loader(flow, 16))) == {"image", "label"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"data.name": "digits"},
            "'digits'.* 'noise', only image, label: .*jax_impl.reflow.*torch_impl/reflow.py.*--config.data.name",
        ),
        ({"model.input_size": 4}, r"'noise'.*floating of shape \(4, 4, 1\)"),
        (
            {"data.name": "runs/none"},
            "runs/none .* is not the directory of a dataset.  Config.method.name=rectified learns",
        ),
        ({"data.augment.prob": 0.1}, "not the `noise` stored with them, .*: set --config.data.augment.prob=0$"),
    ],
)
def test_couplings_that_are_not_there_or_do_not_fit(coupled, change, words):
    coupled.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=words):
        loader.make_loader(coupled, 16)


def test_no_features_without_repa(featured):
    for config in (options.recompose(featured, "unet", "meanflow"), featured):
        featured.model.repa_dims = ()
        assert set(next(loader.make_loader(config, 16))) == {"image", "label"}


def test_whole_splits_need_no_features(featured):
    featured.model.repa_dims = (99,)
    images, labels = loader.load_arrays(featured, "train")
    assert len(images) == len(labels) == 40


def test_what_is_kept_in_memory_counts_the_features(featured, monkeypatch):
    """Of the 40 images of 256 bytes and the features of 320."""
    for most, kept in ((40 * 400, False), (40 * 600, True)):
        monkeypatch.setattr(examples, "MAX_KEPT_BYTES", most)
        opened = examples.open_examples(featured, "train", features.repa(featured).feature)
        assert "features" in opened[0]
        assert bool(opened.kept) == kept


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"data.name": "digits"},
            "'digits'.* no feature 'features', only image, label: .*repa_dims.*--config.data.enc",
        ),
        ({"model.repa_dims": (5, 1)}, r"'features'.*floating of shape \(16, 6\).*config.model.repa_dims"),
        ({"model.patch_size": 4}, r"'features'.*floating of shape \(4, 5\).*config.model.patch_size"),
        ({"data.augment.prob": 0.1}, "not the `features` .*--config.data.augment.prob=0, .*--config.data.encoder"),
    ],
)
def test_features_that_are_not_there_or_do_not_fit(featured, change, words):
    featured.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=words):
        loader.make_loader(featured, 16)


def test_a_network_told_of_other_labels(augmented):
    augmented = options.recompose(augmented, "unet", "meanflow")
    augmented.model.augment_dim = 6
    with pytest.raises(UserError, match="augment_dim is 6, .* makes 4 labels: set --config.model.augment_dim=4, or 0"):
        loader.make_loader(augmented, BATCH)
    augmented.model.augment_dim = 4
    loader.make_loader(augmented, BATCH)
    augmented.data.augment.prob, augmented.model.augment_dim = 0.0, 6
    assert set(next(loader.make_loader(augmented, BATCH))) == {"image", "label"}


def test_the_seed_decides_the_order(config):
    first = take(loader.make_loader(config, BATCH), 2)
    assert_same(take(loader.make_loader(config, BATCH), 2), first)
    config.seed = 1
    assert np.any(next(loader.make_loader(config, BATCH))["label"] != first[0]["label"])


def test_flips_half_of_the_images_anew_in_each_epoch(config):
    plain, labels = rows(take(loader.make_loader(config, NUM), 2))
    config.data.flip = True
    flipped, same_labels = rows(take(loader.make_loader(config, NUM), 2))
    np.testing.assert_array_equal(labels, same_labels)
    mirrored = np.any(plain != flipped, axis=(1, 2, 3))
    np.testing.assert_array_equal(flipped[mirrored], plain[mirrored][:, :, ::-1])
    assert 0.45 < mirrored.mean() < 0.55

    first, second = (
        dict(zip(map(bytes, part), flags, strict=True))
        for part, flags in ((plain[:NUM], mirrored[:NUM]), (plain[NUM:], mirrored[NUM:]))
    )
    assert 0.4 < np.mean([first[image] != second[image] for image in first]) < 0.6


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumes_after_the_last_batch_returned(augmented, num_workers):
    """Whatever was prefetched beyond it; and rows depend neither on workers nor on processes."""
    expected = [{key: a[8:] for key, a in batch.items()} for batch in take(loader.make_loader(augmented, 16), STEPS)]
    batches = loader.make_loader(augmented, 16, 1, 2)
    assert_same(take(batches, 3), expected[:3])
    state = batches.get_state()
    batches.close()
    augmented.data.num_workers = num_workers
    resumed = loader.make_loader(augmented, 16, 1, 2)
    resumed.set_state(state)
    assert_same(take(resumed, STEPS - 3), expected[3:])
    resumed.close()


def test_a_running_loader_can_be_set_back(config):
    batches = loader.make_loader(config, BATCH)
    state = batches.get_state()
    first = take(batches, 2)
    batches.set_state(state)
    assert_same(take(batches, 2), first)


def test_a_state_serves_any_number_of_processes(config):
    batches = loader.make_loader(config, BATCH)
    take(batches, 2)
    expected = next(loader_at(config, batches.get_state(), 0, 1))
    halves = [next(loader_at(config, batches.get_state(), p, 2)) for p in range(2)]
    np.testing.assert_array_equal(np.concatenate([half["image"] for half in halves]), expected["image"])


def loader_at(config, state, process, num_processes):
    batches = loader.make_loader(config, BATCH, process, num_processes)
    batches.set_state(state)
    return batches


@pytest.mark.parametrize(
    ("change", "batch_size", "words"),
    [
        ({"seed": 3}, BATCH, "seed 0, this run has 3"),
        ({}, 128, "batch_size 256, this run has 128"),
        ({"data.split": "train[:9]"}, BATCH, r"split 'train', this run has 'train\[:9\]'"),
    ],
)
def test_a_state_of_another_run(config, change, batch_size, words):
    state = loader.make_loader(config, BATCH).get_state()
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=words):
        loader.make_loader(config, batch_size).set_state(state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"model.input_size": 32},
            r"record \d+ of digits \(train\) .* \(8, 8, 1\).* \(32, 32, 1\).*model.input_size",
        ),
        ({"model.channels": 3}, r"\(8, 8, 1\).* \(8, 8, 3\).*--config.model.channels"),
        ({"model.num_classes": 4}, r"record \d+ of digits \(train\) has label [4-9].*--config.model.num_classes"),
    ],
)
def test_a_record_that_does_not_fit(config, change, words):
    config.update_from_flattened_dict({"data.name": "digits"} | change)
    batches = loader.make_loader(config, 16)
    with pytest.raises(UserError, match=words):
        take(batches, 3)
    with pytest.raises(UserError, match=words):
        loader.load_arrays(config, "train")


def test_wrong_arguments(config):
    with pytest.raises(UserError, match="batch of 10 .*train.batch_size.* 4 processes"):
        loader.make_loader(config, 10, 0, 4)
    config.seed = -1
    with pytest.raises(UserError, match="config.seed is -1"):
        loader.make_loader(config, 8)


def test_load_arrays(config):
    config.data.name = "digits"
    images, labels = loader.load_arrays(config, "test")
    assert images.shape == (400, 8, 8, 1)
    assert images.dtype == np.float32
    assert labels.shape == (400,)
    assert labels.dtype == np.int32
    again, _ = loader.load_arrays(config, "test")
    np.testing.assert_array_equal(images, again)


def example(image):
    return examples.Examples([{"image": image, "label": 0}], "made", (2, 2, 1), 10)[0]["image"]


def test_data_units():
    stored = np.array([0, 51, 204, 255], np.uint8).reshape(2, 2, 1)
    np.testing.assert_allclose(example(stored).ravel(), [-1, -0.6, 0.6, 1], atol=1e-7)


def test_floats_pass_unscaled():
    latent = np.array([-7.5, 0, 3, 200]).reshape(2, 2, 1)
    assert example(latent).dtype == np.float32
    np.testing.assert_array_equal(example(latent), latent)


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_just_outside(label):
    image = np.zeros((2, 2, 1), np.uint8)
    with pytest.raises(UserError, match=rf"record 0 of made has label {label}, outside \[0, 10\)"):
        examples.Examples([{"image": image, "label": label}], "made", (2, 2, 1), 10)[0]


def test_other_integers_are_refused():
    with pytest.raises(UserError, match="record 0 of made is an image of uint16"):
        example(np.zeros((2, 2, 1), np.uint16))


@pytest.mark.parametrize(("batch_size", "num_processes"), [(1, 1), (4, 4)])
def test_one_row_a_process(config, batch_size, num_processes):
    expected, _ = rows(take(loader.make_loader(config, 2), 4))
    loaders = [loader.make_loader(config, batch_size, p, num_processes) for p in range(num_processes)]
    images, _ = rows([next(batches) for _ in range(8 // batch_size) for batches in loaders])
    np.testing.assert_array_equal(images, expected)


def test_a_batch_larger_than_the_dataset(featured):
    images, _ = rows(take(loader.make_loader(featured, 100), 2))
    assert images.shape == (200, 8, 8, 1) and len(np.unique(images[:40], axis=0)) == len(images[:40])


def test_rows_do_not_depend_on_the_number_of_processes(augmented):
    """Flips and augmentations included: process p of n has rows p b/n to (p + 1) b/n of each global batch."""
    expected = take(loader.make_loader(augmented, 8), 5)
    for process, num_processes in [(p, n) for n in (1, 2, 4) for p in range(n)]:
        size = 8 // num_processes
        batches = loader.make_loader(augmented, 8, process, num_processes)
        own = slice(process * size, (process + 1) * size)
        assert_same(take(batches, 5), [{key: a[own] for key, a in batch.items()} for batch in expected])


def test_workers_outlive_the_signals_that_stop_a_run(config):
    """Schedulers send them to all processes of a job.  A worker that died of something else is reported."""
    expected = take(loader.make_loader(config, 16), 24)
    config.data.num_workers = 2
    batches = loader.make_loader(config, 16)
    found = take(batches, 1)
    workers = multiprocessing.active_children()
    for worker in workers:
        for number in (*signals.STOP, signal.SIGINT):
            os.kill(worker.pid, number)  # pyright: ignore
    found += take(batches, 11)
    assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
    workers[0].kill()
    with pytest.raises(UserError, match="a process that loads data died .signal 9.*--config.data.num_workers=1"):
        take(batches, 24)
    batches.close()
    batches._num_workers = 1
    batches.set_state(json.dumps(json.loads(batches.get_state()) | {"step": 12}))
    assert_same(found, expected[:12])
    with signals.caught():
        found += take(batches, 1)
        os.kill(os.getpid(), signal.SIGUSR1)
        for worker in multiprocessing.active_children():
            worker.kill()
        found += take(batches, 11)  # some of them read in this process
        assert signals.asked()
    batches.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert_same(found, expected)
