"""Latents on the way to the trainer: drawn anew from their moments, mirrored by their twins, of the dataset's scale."""

import json

import numpy as np
import pytest

from configs import digits
from meanflow.config import latents as conventions
from meanflow.data import examples, loader
from meanflow.data.latents import dataset as latents
from meanflow.data.latents import units
from meanflow.errors import UserError

NUM, SHAPE = 12, (4, 4, 2)
CONVENTION = conventions.Convention((1.0, -2.0), (0.5, 0.25))


def moments(i, mirrored=False):
    """Return those of image i: the mean is its number, each column another; the deviation is small."""
    mean = np.full(SHAPE, i, np.float32) + np.arange(4, dtype=np.float32)[:, None] / 10
    mean = mean[:, ::-1] + 100 if mirrored else mean
    return np.concatenate([mean, np.full(SHAPE, 1e-3, np.float32)], axis=-1)


def write(directory, flip=True, convention=CONVENTION):
    """Write a dataset of latents, and return its name."""

    def of_shard(indices, skipped):
        for i in indices:
            twin = {"moments_flip": moments(i, True)} if flip else {}
            yield {"moments": moments(i), "label": i % 3, "name": f"{i}.png"} | twin

    facts = {"vae": "some/vae", "latent_shape": SHAPE, "convention": conventions.to_dict(convention)}
    shards = [range(0, 5), range(5, NUM)]
    latents.write(latents.Job(directory, latents.features(SHAPE, flip), shards, facts, facts), of_shard)
    return str(directory)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write(tmp_path_factory.mktemp("latents") / "twins")


@pytest.fixture
def config(dataset):
    config = digits.get_config()
    config.data.update(name=dataset, flip=False)
    config.model.update(input_size=4, channels=2, num_classes=3)
    return config


def take(config, num, batch_size=NUM, **group):
    batches = loader.make_loader(config, batch_size, **group)
    return [next(batches) for _ in range(num)]


def numbers(images):
    """Return the numbers of images in data units, and whether each is the twin of the mirrored image."""
    raw = images / np.float32(CONVENTION.scale) + np.float32(CONVENTION.shift)
    twin = raw[:, 0, 0, 0] > 50
    raw = np.where(twin[:, None, None, None], raw[:, :, ::-1] - 100, raw)
    return np.rint(raw[:, 0, 0, 0]).astype(int), twin


def test_latents_come_in_data_units_and_are_drawn_anew(config):
    first, second = take(config, 2)
    assert first["image"].dtype == np.float32 and first["image"].shape == (NUM, *SHAPE)
    assert set(first) == {"image", "label"}
    means = np.stack([units.to_data_units(moments(i)[..., :2], CONVENTION) for i in range(NUM)])
    drawn = []
    for batch in (first, second):
        ids, twins = numbers(batch["image"])
        assert sorted(ids) == list(range(NUM)) and not twins.any()
        np.testing.assert_array_equal(batch["label"], ids % 3)
        noise = (batch["image"] - means[ids]) / (1e-3 * np.float32(CONVENTION.scale))
        assert 0.8 < noise.std() < 1.2 and abs(noise.mean()) < 0.2
        drawn.append(noise[np.argsort(ids)])
    assert np.mean(drawn[0] != drawn[1]) > 0.9


def test_flips_take_the_twin(config):
    config.data.flip = True
    twins = np.concatenate([numbers(batch["image"])[1] for batch in take(config, 8)])
    assert 0.3 < twins.mean() < 0.7


def test_flips_mirror_the_moments_where_there_is_no_twin(config, tmp_path):
    config.data.update(name=write(tmp_path / "plain", flip=False), flip=True)
    rising = np.concatenate([b["image"][:, 0, 1, 0] - b["image"][:, 0, 0, 0] for b in take(config, 8)])
    assert 0.3 < (rising > 0).mean() < 0.7


def test_processes_and_resuming_see_the_same_draws(config):
    whole = take(config, 3, 4)
    parts = [take(config, 3, 4, process=p, num_processes=2) for p in range(2)]
    for batch, *halves in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(batch["image"], np.concatenate([half["image"] for half in halves]))
    resumed, batches = loader.make_loader(config, 4), loader.make_loader(config, 4)
    next(batches)
    resumed.set_state(batches.get_state())
    np.testing.assert_array_equal(next(resumed)["image"], whole[1]["image"])


def test_whole_splits_are_drawn_once(config):
    images, labels = loader.load_arrays(config, "train")
    np.testing.assert_array_equal(numbers(images)[0], range(NUM))
    np.testing.assert_array_equal(labels, np.arange(NUM) % 3)
    np.testing.assert_array_equal(images, loader.load_arrays(config, "train")[0])
    config.seed = 1
    assert np.mean(images != loader.load_arrays(config, "train")[0]) > 0.9


def test_a_config_takes_the_convention_of_its_dataset(config):
    told = examples.with_latents(config)
    assert conventions.of(told) == CONVENTION and told.latents.vae == "some/vae"
    assert not config.latents.scale, "the config itself is left alone"
    config.latents.vae = "of the config"
    assert examples.with_latents(config).latents.vae == "some/vae", "the one that made the data"


def test_another_convention_is_refused_and_both_are_named(config):
    config.latents.update(conventions.CONVENTIONS["imm"]._asdict())
    with pytest.raises(UserError, match=r"'imm' \(scale 0.18125.*scale \[0.5, 0.25\], shift \[1, -2\]"):
        loader.make_loader(config, 4)


def test_moments_without_a_convention(config, tmp_path):
    config.data.name = write(tmp_path / "silent")
    path = tmp_path / "silent" / "metadata.json"
    path.write_text(json.dumps({"vae": "some/vae"}))
    with pytest.raises(UserError, match=r"record 0 .*set --config.latents.shift and --config.latents.scale"):
        examples.open_examples(config, "train")[0]
    config.latents.update(CONVENTION._asdict())
    assert "moments" in examples.open_examples(config, "train")[0]
    path.write_text("{")
    with pytest.raises(UserError, match="metadata.json is damaged"):
        loader.make_loader(config, 4)


def test_pixels_are_no_latents():
    config = digits.get_config()
    config.latents.update(shift=(0.0,), scale=(1.0,))
    with pytest.raises(UserError, match="of pixels, but config.latents.scale says"):
        next(loader.make_loader(config, 4))


@pytest.mark.parametrize("change", [{"input_size": 8}, {"channels": 4}])
def test_other_shapes(config, change):
    config.model.update(change)
    with pytest.raises(
        UserError, match=r"of shape \(4, 4, 4\), but the model expects|give one number, or one for each"
    ):
        next(loader.make_loader(config, 4))
