"""Image metrics with a sampler and features of the test: which images are measured, by what, in how many processes."""

import json
import weakref

import numpy as np
import PIL.Image
import processes
import pytest

from configs import digits
from meanflow.commands import frozen_networks, image_metrics
from meanflow.commands import sample as sampling
from meanflow.commands.frozen_networks import FrozenNetworks
from meanflow.errors import UserError
from meanflow.metrics import dino, references, scores
from meanflow.metrics.extractor import Extractor
from meanflow.metrics.references import Reference
from meanflow.sampling import grids

NUM = 20
rng = np.random.default_rng(0)
REAL = rng.uniform(size=(30, 2)).astype(np.float32)
REFERENCE = Reference(REAL.mean(0), np.cov(REAL, rowvar=False), 30, REAL)


def features(images):
    """Return the mean and the deviation of each channel, [b 2c]."""
    x = images.astype(np.float32) / 255
    return np.concatenate([x.mean((1, 2)), x.std((1, 2))], axis=1)


class Framework:
    """FrozenNetworks whose features are `features`; keeps what they were made of and the images that they saw."""

    def __init__(self):
        self.made, self.seen, self.decoded = [], [], []

    def networks(self):
        return FrozenNetworks(self.make_decoder, self.make_inception)

    def make_inception(self, path, convention):
        self.made.append((path, convention))

        def extract(images):
            assert len(images), "networks take one image or more"
            self.seen.append(images)
            return {"pool": features(images), "logits": 5 * features(images)}

        return extract

    def make_decoder(self, files, convention):
        def decode(z):
            self.decoded.append(z)
            return np.repeat(np.repeat(z[..., :3], 2, axis=1), 2, axis=2) / 4

        return decode


def sampler(weights, noise, y, c, fresh):
    return np.tanh(weights * noise * c.cfg_scale)


@pytest.fixture
def config(tmp_path):
    """Return a config of which 20 samples in batches of 6 are compared with a reference of two features."""
    references.write(tmp_path / "real.npz", REFERENCE)
    config = digits.get_config()
    config.sample.update(batch_size=6, cfg_scale=1.0)
    config.evaluation.update(
        num_samples=NUM, metrics=("fid", "is", "kid", "pr"), reference=str(tmp_path / "real.npz"), inception="w"
    )
    return config


@pytest.fixture
def framework():
    return Framework()


def test_values_are_those_of_the_measures(config, framework):
    values, shown = image_metrics.ImageMetrics(config, framework.networks())(config, sampler, 0.5)
    images, _ = sampling.generate(config, sampler, 0.5, NUM)
    rows = features(grids.to_uint8(images))
    score, score_std = scores.inception_score(5 * rows)
    kid, kid_std = scores.kernel_distance(rows, REAL, subset_size=NUM)
    precision, recall, _ = scores.precision_recall(rows, REAL)
    expected = {
        "num_samples": NUM, "fid": scores.frechet_distance(rows, REAL), "inception_score": score,
        "inception_score_std": score_std, "kid": kid, "kid_std": kid_std, "precision": precision, "recall": recall,
    }  # fmt: skip
    assert values == pytest.approx(expected, rel=1e-6)
    assert expected["fid"] > 0.01 and framework.made == [("w", "torch_fidelity")]
    np.testing.assert_array_equal(shown, images)


def test_each_model_is_measured_anew(config, framework):
    one = image_metrics.ImageMetrics(config, framework.networks())
    first, other = one(config, sampler, 0.5)[0], one(config, sampler, 2.0)[0]
    assert other["fid"] != pytest.approx(first["fid"], rel=0.1)
    assert other == image_metrics.ImageMetrics(config, framework.networks())(config, sampler, 2.0)[0]
    assert len(framework.made) == 2, "weights are read once, not for each model"


def test_samples_are_of_the_guidance_asked_for(config, framework):
    one, guided = image_metrics.ImageMetrics(config, framework.networks()), config.copy_and_resolve_references()
    guided.sample.cfg_scale = 2.0
    assert one(guided, sampler, 1.0)[0] == one(config, sampler, 2.0)[0] != one(config, sampler, 1.0)[0]


@pytest.mark.parametrize("num", [2, 5])
def test_processes_share_the_samples_and_the_first_has_the_result(config, framework, num):
    """Of five the last has none of the four batches."""
    expected, first = image_metrics.ImageMetrics(config, framework.networks())(config, sampler, 0.5)
    framework.seen.clear()
    found = processes.run(
        num, lambda group: image_metrics.ImageMetrics(config, framework.networks(), group)(config, sampler, 0.5)
    )
    assert found[0][0] == pytest.approx(expected, rel=1e-9) and not any(values for values, _ in found[1:])
    assert sum(map(len, framework.seen)) == NUM, "each sample once"
    np.testing.assert_array_equal(found[0][1][:6], first[:6])
    np.testing.assert_array_equal(found[1][1][:6], first[6:12])
    if num == 5:
        assert len(found[4][1]) == 0


@pytest.mark.parametrize("num", [2, 8])
def test_processes_that_sample_together_share_the_features(config, framework, tmp_path, num):
    """Each has all rows of every batch and takes its own; of eight, two have none of any."""
    expected, first = image_metrics.ImageMetrics(config, framework.networks())(config, sampler, 0.5)
    framework.seen.clear()
    asked = []

    def spying(weights, noise, *args):
        asked.append(len(noise))
        return sampler(weights, noise, *args)

    def process(group):
        group = group._replace(together=True)
        return image_metrics.ImageMetrics(config, framework.networks(), group, tmp_path, "npz")(config, spying, 0.5)

    found = processes.run(num, process)
    assert found[0][0] == pytest.approx(expected, rel=1e-9) and not any(values for values, _ in found[1:])
    assert asked == [6] * 4 * num and sum(map(len, framework.seen)) == NUM
    np.testing.assert_array_equal(found[1][1], first[1 :: min(num, 6)])
    with np.load(tmp_path / "samples_uint8.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], grids.to_uint8(first))


@pytest.mark.parametrize(
    ("convention", "level"), [("torch_fidelity", 1), ("jax_meanflow", 1), ("pytorch_fid", 0)]
)  # of -0.996, which is 0.51 of 255
def test_images_are_rounded_by_the_convention(config, framework, convention, level):
    config.evaluation.update(convention=convention, metrics=("is",))
    image_metrics.ImageMetrics(config, framework.networks())(config, lambda weights, noise, *_: 0 * noise - 0.996, None)
    assert framework.made == [("w", convention)]
    assert all(images.dtype == np.uint8 and set(images.ravel()) == {level} for images in framework.seen)


@pytest.fixture
def latents(config, monkeypatch):
    """Return the config of a model of latents of four channels, with an autoencoder."""
    monkeypatch.setattr(
        frozen_networks.autoencoder, "read", lambda n: frozen_networks.autoencoder.Files({"latent_channels": 4}, {}, n)
    )
    config.model.channels = 4
    config.latents.update(shift=(0.0,), scale=(1.0,), vae="some/vae")
    config.evaluation.metrics = ("is",)
    return config


def test_latents_are_decoded_in_batches(latents, framework):
    _, shown = image_metrics.ImageMetrics(latents, framework.networks())(latents, sampler, 1.0)
    assert [z.shape for z in framework.decoded] == [(6, 8, 8, 4)] * 3 + [(2, 8, 8, 4)]
    assert shown.shape == (NUM, 16, 16, 3)
    np.testing.assert_array_equal(np.concatenate(framework.seen), grids.to_uint8(shown))
    np.testing.assert_array_equal(shown[:6, ::2, ::2], framework.decoded[0][..., :3] / 4)


def test_latents_that_nothing_decodes(latents, framework):
    latents.latents.vae = ""
    with pytest.raises(UserError, match="samples have 4 channels, .*name the autoencoder .* by --vae or config.latent"):
        image_metrics.ImageMetrics(latents, framework.networks())
    latents.model.channels = 3
    image_metrics.ImageMetrics(latents, framework.networks())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite(config, framework, value):
    with pytest.raises(UserError, match="values that are not finite: .* evaluate an earlier checkpoint"):
        image_metrics.ImageMetrics(config, framework.networks())(
            config, lambda w, noise, *_: np.where(noise > 1, value, noise), None
        )
    assert not framework.seen


def test_the_first_samples_are_shown_and_no_batch_is_held(config):
    """Or 50000 images would be in memory at once."""
    batches, held = [], []

    def sampler(weights, noise, y, c, fresh):
        held.append(sum(batch() is not None for batch in batches))
        images = np.tanh(noise)
        batches.append(weakref.ref(images))
        return images

    config.sample.batch_size = 40
    config.evaluation.update(num_samples=200, metrics=("is",))
    framework = FrozenNetworks(None, lambda *_: lambda images: {"logits": features(images)})
    _, shown = image_metrics.ImageMetrics(config, framework)(config, sampler, None)
    assert len(shown) == image_metrics.SHOWN and len(batches) == 5
    assert max(held) <= 1, "but the one before"
    np.testing.assert_array_equal(shown, np.tanh(sampling.generate(config, lambda w, x, *_: x, None, 64)[0]))


@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize("kind", ["png", "npz"])
def test_images_are_saved_as_they_are_measured(config, framework, tmp_path, kind, num):
    config.evaluation.update(convention="pytorch_fid", metrics=("is",))
    images, labels = sampling.generate(config, sampler, 0.5, NUM)
    expected = grids.to_uint8(images, "floor")
    output = tmp_path / "new"
    processes.run(
        num,
        lambda group: image_metrics.ImageMetrics(config, framework.networks(), group, output, kind)(
            config, sampler, 0.5
        ),
    )
    if kind == "npz":
        with np.load(output / "samples_uint8.npz") as file:
            np.testing.assert_array_equal(file["arr_0"], expected)
            np.testing.assert_array_equal(file["arr_1"], labels)
        return
    pairs = json.loads((output / "dataset.json").read_text())["labels"]
    assert pairs == [[f"{i:06d}.png", int(label)] for i, label in enumerate(labels)]
    for (name, _), image in zip(pairs, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(PIL.Image.open(output / name)), image[..., 0])


def test_nothing_is_saved_unless_asked_for(config, framework, tmp_path):
    image_metrics.ImageMetrics(config, framework.networks(), output=tmp_path / "new")(config, sampler, 0.5)
    assert not (tmp_path / "new").exists()


def test_what_the_metrics_need_of_a_reference(config):
    c = config.evaluation
    assert set(image_metrics.read_references(c)) == {"fid", "kid", "pr"}
    np.testing.assert_array_equal(image_metrics.read_references(c)["kid"].features, REAL)
    c.update(metrics=("is",), reference="")
    assert image_metrics.read_references(c) == {}
    c.update(metrics=("fid",), reference="no/such.npz")
    with pytest.raises(UserError, match="cannot read no/such.npz"):
        image_metrics.read_references(c)


def test_a_reference_of_another_convention(config, tmp_path):
    c, path = config.evaluation, tmp_path / "other.npz"
    of_both = {"fid": REFERENCE._replace(convention="pytorch_fid"), "fd_dinov2": REFERENCE._replace(convention="x")}
    references.write(path, of_both)
    c.update(reference=str(path), metrics=("fd_dinov2",))
    assert image_metrics.read_references(c)["fd_dinov2"].convention == "x", "DINOv2 has but one"
    c.metrics = ("fd_dinov2", "fid")
    with pytest.raises(UserError, match="other.npz .* holds .* pytorch_fid, but config.evaluation.convention is torch"):
        image_metrics.read_references(c)
    c.convention = "pytorch_fid"
    assert set(image_metrics.read_references(c)) == {"fid", "fd_dinov2"}


def test_a_reference_is_read_before_anything_is_sampled(config, framework):
    config.evaluation.reference = "no/such.npz"
    with pytest.raises(UserError, match="cannot read no/such.npz"):
        image_metrics.ImageMetrics(config, framework.networks())
    assert not framework.made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ("is",), "num_samples": 9}, "is needs at least 10 samples, but there are 9: use more"),
        ({"metrics": ("kid", "pr"), "num_samples": 3}, "pr needs at least 4 samples, but there are 3"),
    ],
)
def test_too_few_samples(config, framework, changes, message):
    config.evaluation.update(changes)
    with pytest.raises(UserError, match=message):
        image_metrics.ImageMetrics(config, framework.networks())
    assert not framework.made


def test_a_reference_of_another_size(config, framework, tmp_path):
    references.write(tmp_path / "real.npz", REFERENCE._replace(image_size=(8, 8)))
    image_metrics.ImageMetrics(config, framework.networks())
    references.write(tmp_path / "real.npz", REFERENCE._replace(image_size=(64, 64)))
    with pytest.raises(UserError, match=r"for fid belong to images of 64 x 64 pixels, the images have 8 x 8 \(h x w\)"):
        image_metrics.ImageMetrics(config, framework.networks())


def test_the_size_of_samples_is_that_of_decoded_ones(latents, framework, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_networks.autoencoder, "read_factor", lambda name: {"some/vae": 2}[name])
    references.write(tmp_path / "real.npz", REFERENCE._replace(image_size=(16, 16)))
    latents.evaluation.metrics = ("fid",)
    image_metrics.ImageMetrics(latents, framework.networks())
    references.write(tmp_path / "real.npz", REFERENCE._replace(image_size=(8, 8)))
    with pytest.raises(UserError, match="images of 8 x 8 pixels, the images have 16 x 16"):
        image_metrics.ImageMetrics(latents, framework.networks())


def test_a_reference_of_other_features(config, framework):
    extract = Extractor(lambda images: pytest.fail("features are made"), {"pool": 2048, "logits": 1008})
    with pytest.raises(UserError, match="for fid have 2 features, but the images have 2048 of pool"):
        image_metrics.ImageMetrics(config, framework.networks()._replace(make_inception=lambda *_: extract))


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_images_that_cannot_be_saved(config, framework, tmp_path, kind):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file/new/dataset.json"):
        image_metrics.ImageMetrics(config, framework.networks(), output=tmp_path / "file" / "new", save=kind)
    assert not framework.made


@pytest.mark.parametrize(
    ("names", "needed", "networks"),
    [
        (("fid", "pr"), {"pool"}, ["inception"]),
        (("is",), {"logits"}, ["inception"]),
        (("fd_dinov2",), {"dino"}, ["dino"]),
        (("fd_dinov2", "kid", "is"), {"pool", "logits", "dino"}, ["inception", "dino"]),
    ],
)
def test_only_the_networks_that_are_needed(config, framework, monkeypatch, names, needed, networks):
    loaded = []
    monkeypatch.setattr(dino, "load", lambda name: loaded.append(name) or (lambda x: {"dino": -features(x)}))
    images = np.full((3, 4, 4, 1), 255, np.uint8)
    found = image_metrics.extractor(names, config.evaluation, framework.networks())(images)
    assert set(found) == needed and all(rows.shape == (3, 2) for rows in found.values())
    assert len(framework.made) == ("inception" in networks) and len(framework.seen) == len(framework.made)
    assert loaded == ["facebook/dinov2-large"] * ("dino" in networks)


def test_provenance(config):
    c = config.evaluation
    assert image_metrics.provenance(c) == {"convention": "torch_fidelity", "reference": c.reference}
    c.metrics = ()
    assert image_metrics.provenance(c) == {}
