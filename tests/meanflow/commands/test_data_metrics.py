"""The verdict on samples, with real digits in the place of samples."""

import json

import numpy as np
import pytest

from configs import digits
from meanflow.commands import data_metrics
from meanflow.data import loader
from meanflow.errors import UserError
from meanflow.metrics import scores


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(tmp_path_factory.mktemp("report"))


@pytest.fixture
def config(directory):
    config = digits.get_config()
    config.data.dir = directory
    return config


def test_real_images_reach_the_real_numbers(config):
    images, labels = loader.load_arrays(config, "test")
    result = data_metrics.evaluate_samples(images, labels, config)
    assert result["num_samples"] == 400
    assert result["class_accuracy"] == result["real_class_accuracy"] > 0.97
    assert result["frechet_distance_pixels"] == result["real_frechet_distance_pixels"] > 0


def test_the_training_images_are_at_no_distance(config):
    images, labels = loader.load_arrays(config, "train")
    assert data_metrics.evaluate_samples(images, labels, config)["frechet_distance_pixels"] == pytest.approx(
        0, abs=1e-9
    )


def test_noise_is_worse(config):
    images = np.random.default_rng(0).standard_normal((200, 8, 8, 1)).astype(np.float32)
    result = data_metrics.evaluate_samples(images, np.arange(200) % 10, config)
    assert result["class_accuracy"] < 0.3
    assert result["frechet_distance_pixels"] > 5 * result["real_frechet_distance_pixels"]


def test_options(config):
    """Without the classifier only the distance; against `test` there is no other split to compare with."""
    images, labels = loader.load_arrays(config, "train")
    config.evaluation.split = "test"
    result = data_metrics.evaluate_samples(images, labels, config)
    assert set(result) == {"num_samples", "class_accuracy", "frechet_distance_pixels"}
    config.evaluation.split = "train"
    config.evaluation.classifier = False
    assert set(data_metrics.evaluate_samples(images, labels, config)) == {"num_samples", "frechet_distance_pixels"}


def test_features_that_are_given_have_a_distance_of_their_own(config):
    images, labels = loader.load_arrays(config, "test")
    projection = np.random.default_rng(0).standard_normal((64, 5))
    config.evaluation.classifier = False
    features = {"frechet_distance_random": lambda a: a.reshape(len(a), -1) @ projection}
    result = data_metrics.evaluate_samples(images, labels, config, features)
    real, _ = loader.load_arrays(config, "train")
    expected = scores.frechet_distance(*(a.reshape(len(a), -1) @ projection for a in (images, real)))
    assert set(result) == {"num_samples", "frechet_distance_pixels", "frechet_distance_random"}
    assert result["frechet_distance_random"] == pytest.approx(expected) and expected > 0


def test_a_dataset_without_a_test_split(config, monkeypatch):
    images, labels = loader.load_arrays(config, "test")
    monkeypatch.setattr(data_metrics.sources, "split_names", lambda name, directory: ("train",))
    assert "real_class_accuracy" not in data_metrics.evaluate_samples(images, labels, config)


def test_samples_are_compared_with_the_dataset_that_evaluation_names(config):
    """Such as the one of which a teacher, whose couplings are learnt, has learnt."""
    expected, _ = loader.load_arrays(config, "train")
    config.data.name, config.evaluation.dataset = "couplings/of/a/teacher", "digits"
    config.evaluation.classifier = False
    before = config.to_dict()
    found = data_metrics.load_real(config)
    np.testing.assert_array_equal(found.images, expected)
    assert config.to_dict() == before


def test_real_images_that_are_given_are_not_loaded_again(config, monkeypatch):
    images, labels = loader.load_arrays(config, "test")
    expected, real = data_metrics.evaluate_samples(images, labels, config), data_metrics.load_real(config)
    monkeypatch.setattr(data_metrics, "load_real", None)
    assert data_metrics.evaluate_samples(images, labels, config, real=real) == expected


def test_every_ema_is_evaluated_on_the_same_samples(config, monkeypatch):
    """The weights are added to the noise; the real images are loaded once."""
    config.evaluation.update(classifier=False, num_samples=70)
    config.sample.update(batch_size=30, ema=1)
    config.train.ema_decays = (0.9, 0.99)
    real, images = np.zeros((9, 8, 8, 1)), []
    loads = iter([data_metrics.Real(real, np.zeros(9), {})])
    monkeypatch.setattr(data_metrics, "load_real", lambda config: next(loads))

    def sampler(weights, noise, y, c, fresh):
        images.append(weights + noise)
        return images[-1]

    result = data_metrics.evaluate_emas(config, sampler, (0.0, 1.0))
    rows = [np.concatenate(part)[:70].reshape(70, -1) for part in (images[:3], images[3:])]
    np.testing.assert_array_equal(rows[1], rows[0] + 1)
    first, second = (scores.frechet_distance(a, real.reshape(9, -1)) for a in rows)
    assert result == {
        "frechet_distance_pixels_ema_0.9": first, "frechet_distance_pixels_ema_0.99": second,
        "num_samples": 70, "frechet_distance_pixels": second,
    }  # fmt: skip
    config.sample.ema, loads = -1, iter([data_metrics.Real(real, np.zeros(9), {})])
    assert set(data_metrics.evaluate_emas(config, sampler, (0.0, 1.0))) == set(list(result)[:2])


@pytest.mark.parametrize(
    ("images", "num_labels", "words"),
    [
        (np.zeros((4, 8, 8, 3)), 4, r"\(4, 8, 8, 3\).*\(1397, 8, 8, 1\)"),
        (np.zeros((4, 8, 8, 1)), 3, r"labels \(3,\)"),
        (np.zeros((1, 8, 8, 1)), 1, "--config.evaluation.num_samples"),
        (np.stack([np.zeros((8, 8, 1)), np.full((8, 8, 1), np.inf)]), 2, "1 of 2 samples .*not finite"),
    ],
)
def test_samples_that_cannot_be_evaluated(config, images, num_labels, words):
    with pytest.raises(UserError, match=words):
        data_metrics.evaluate_samples(images, np.zeros(num_labels, int), config)


def test_what_cannot_be_compared_is_not_sampled(config, monkeypatch):
    """By a run that judges itself, neither."""
    one_class = data_metrics.Real(np.zeros((2, 8, 8, 1)), np.zeros(2), {})
    monkeypatch.setattr(data_metrics, "load_real", lambda config: one_class)
    with pytest.raises(UserError, match="all real images have the same class"):
        data_metrics.evaluate(config, lambda *_: pytest.fail("it samples"), None)


def test_write_evaluation(tmp_path):
    line = data_metrics.write_evaluation(tmp_path / "run", {"class_accuracy": 0.5, "frechet_distance_pixels": 1.5})
    assert "\n" not in line
    assert json.loads(line) == {"class_accuracy": 0.5, "frechet_distance_pixels": 1.5}
    assert (tmp_path / "run" / "evaluation.json").read_text() == line + "\n"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file/evaluation.json"):
        data_metrics.write_evaluation(tmp_path / "file", {})
