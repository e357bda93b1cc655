"""Features of a frozen DINOv2 are those of transformers, on the images that the network sees."""

import itertools
import shutil
import sys

import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
import torch
import transformers
from etils import epath

from configs import digits
from meanflow.data import features as encoder
from meanflow.data import loader
from meanflow.errors import UserError

GRID, WIDTH = 4, 16
ATOL = 5e-5  # for features of 0.3 in the mean
SIZES = {
    "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14, "image_size": 14 * GRID,
}  # fmt: skip


class Latents(tfds.core.GeneratorBasedBuilder):
    """Latents of four channels, in one version with the images beside them; image and latent i have one seed."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = epath.Path(__file__).parent  # TFDS looks it up by itself only for a module inside a package
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("alone", "beside")]  # noqa: RUF012

    def _info(self):
        features = {
            "image": tfds.features.Tensor(shape=(8, 8, 4), dtype=np.float32),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        if self.builder_config.name == "beside":
            features["pixels"] = tfds.features.Image(shape=(32, 32, 3))
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(10):
            latent, pixels = latent_and_pixels(i)
            beside = {"pixels": pixels} if self.builder_config.name == "beside" else {}
            yield i, {"image": latent, "label": i} | beside


def latent_and_pixels(i):
    rng = np.random.default_rng(i)
    return rng.normal(size=(8, 8, 4)).astype(np.float32), rng.integers(256, size=(32, 32, 3), dtype=np.uint8)


def save(path, model):
    """Save a model with weights of a size at which every one of them matters; return its directory."""
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=rng)
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Return the directory of a tiny DINOv2, which has a position for each token of our network."""
    return save(tmp_path_factory.mktemp("dinov2"), transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)))


@pytest.fixture
def config(datasets_dir, path):
    config = digits.get_config("flow")
    config.data.update(dir=datasets_dir, encoder=path, flip=True)
    config.method.name = "flow"
    config.model.update(interval_embedder=False, repa_dims=(WIDTH,))
    return config


def images(channels, num=3, size=8):
    """Return images in data units, float32."""
    return np.random.default_rng(0).uniform(-1, 1, (num, size, size, channels)).astype(np.float32)


def cubic(old, new):
    """Return the matrix [new old] of cubic convolution with a = -0.75, which repeats the border."""

    def weight(x, a=-0.75):
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[i, np.clip(j, 0, old - 1)] += weight(centre - j)
    return matrix


def prepared(x):
    """Return images [b h w 3] in data units as DINOv2 expects them, [b 3 side side], by hand."""
    x = ((x + 1) / 2 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    rows = cubic(x.shape[1], 14 * GRID)
    return torch.tensor(np.einsum("ih,jw,bhwc->bcij", rows, rows, x), dtype=torch.float32)


@torch.no_grad()
def tokens(model, x):
    return model.eval()(x).last_hidden_state.numpy()


@pytest.mark.parametrize("size", [8, 32, 100])
def test_features_are_those_of_transformers(path, size):
    x = images(3, size=size)
    features = encoder.load(path, GRID, WIDTH)(x)
    assert features.shape == (3, GRID**2, WIDTH)
    assert features.dtype == np.float32
    expected = tokens(transformers.Dinov2Model.from_pretrained(path), prepared(x))[:, 1:]
    np.testing.assert_allclose(features, expected, atol=ATOL)


def test_register_tokens_are_left_out(tmp_path):
    sizes = transformers.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3)
    path = save(tmp_path, transformers.Dinov2WithRegistersModel(sizes))
    x = images(3)
    expected = tokens(transformers.Dinov2WithRegistersModel.from_pretrained(path), prepared(x))
    assert expected.shape[1] == 1 + 3 + GRID**2
    np.testing.assert_allclose(encoder.load(path, GRID, WIDTH)(x), expected[:, 4:], atol=ATOL)


def test_positions_are_resampled_with_a_low_pass_filter(tmp_path):
    """From 9x9 to our 4x4, as the official code does it and as Pillow does."""
    model = transformers.Dinov2Model(transformers.Dinov2Config(**SIZES | {"image_size": 14 * 9}))
    path = save(tmp_path, model)
    table = model.embeddings.position_embeddings.detach().numpy()[0]
    grid = table[1:].reshape(9, 9, WIDTH)
    planes = [
        PIL.Image.fromarray(grid[:, :, c]).resize((GRID, GRID), PIL.Image.Resampling.BICUBIC) for c in range(WIDTH)
    ]
    expected = np.concatenate([table[:1], np.stack(planes, axis=-1).reshape(GRID**2, WIDTH)])
    e = encoder.load(path, GRID, WIDTH)
    np.testing.assert_allclose(e.model.embeddings.position_embeddings[0].detach().numpy(), expected, atol=1e-5)
    assert e(images(3)).shape == (3, GRID**2, WIDTH)


def test_grey_images(path):
    e, x = encoder.load(path, GRID, WIDTH), images(1)
    np.testing.assert_array_equal(e(x), e(np.repeat(x, 3, axis=-1)))


def test_bytes_are_the_same_images(path):
    e, x = encoder.load(path, GRID, WIDTH), latent_and_pixels(0)[1][None]
    np.testing.assert_allclose(e(x), e(x / np.float32(127.5) - 1), atol=ATOL)


def test_it_is_frozen_and_deterministic(path, tmp_path):
    """And in float32, whatever its weights are stored in."""
    transformers.Dinov2Model.from_pretrained(path).half().save_pretrained(tmp_path)
    for directory in (path, tmp_path):
        e = encoder.load(str(directory), 2, WIDTH)
        assert not e.model.training
        assert not any(parameter.requires_grad for parameter in e.model.parameters())
        assert {parameter.dtype for parameter in e.model.parameters()} == {torch.float32}
        x = images(3)
        np.testing.assert_array_equal(e(x), e(x))
        np.testing.assert_array_equal(e(x), encoder.load(str(directory), 2, WIDTH)(x))


def take(batches, num):
    return list(itertools.islice(batches, num))


@pytest.mark.parametrize("augment_prob", [0.0, 1.0])
def test_a_batch_has_the_features_of_its_own_images(config, path, augment_prob):
    """Mirrored and augmented as they are, in both processes."""
    config.data.augment.prob = augment_prob
    e = encoder.load(path, GRID, WIDTH)
    whole = take(loader.make_loader(config, 8), 2)
    halves = [take(loader.make_loader(config, 8, process, 2), 2) for process in range(2)]
    config.model.repa_dims, config.data.encoder = (), ""
    for batch, first, second, plain in zip(whole, *halves, take(loader.make_loader(config, 8), 2), strict=True):
        assert set(batch) == {*plain, "features"}
        for key in plain:
            np.testing.assert_array_equal(batch[key], plain[key])
        np.testing.assert_array_equal(batch["features"], e(batch["image"]))
        np.testing.assert_allclose(
            np.concatenate([first["features"], second["features"]]), batch["features"], atol=ATOL
        )


def test_resumes_with_the_same_features(config):
    batches = loader.make_loader(config, 8)
    take(batches, 2)
    state = batches.get_state()
    expected = next(batches)
    resumed = loader.make_loader(config, 8)
    resumed.set_state(state)
    batch = next(resumed)
    for key in expected:
        np.testing.assert_array_equal(batch[key], expected[key])


def test_latents_have_the_features_of_the_pixels_beside_them(config, path, tmp_path):
    config.data.update(name="latents/beside", dir=str(tmp_path))
    config.model.channels = 4
    e, mirrored = encoder.load(path, GRID, WIDTH), []
    for batch in take(loader.make_loader(config, 5), 4):
        assert set(batch) == {"image", "label", "features"}
        stored, pixels = (np.stack(arrays) for arrays in zip(*map(latent_and_pixels, batch["label"]), strict=True))
        turned = np.any(batch["image"] != stored, axis=(1, 2, 3))
        pixels = np.where(turned[:, None, None, None], pixels[:, :, ::-1], pixels)
        np.testing.assert_array_equal(batch["features"], e(pixels))
        mirrored.extend(turned)
    assert 0 < sum(mirrored) < 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.repa_dims": (16, 16)}, r"repa_dims is \(16, 16\), .*encoder is only one encoder: .*`features`"),
        ({"model.repa_dims": (24,)}, r"width 16, but config.model.repa_dims asks for 24: set .*='\(16,\)'"),
        ({"data.name": "latents/alone", "model.channels": 4}, "no feature 'pixels', .*these have 4 .*`features`"),
        (
            {"data.name": "latents/beside", "model.channels": 4, "data.augment.prob": 0.1},
            "not the `pixels` stored with them, .*--config.data.augment.prob=0",
        ),
    ],
)
def test_configs_that_do_not_fit(config, tmp_path, change, words):
    config.update_from_flattened_dict({"data.dir": str(tmp_path)} | change)
    with pytest.raises(UserError, match=words):
        loader.make_loader(config, 5)


def test_transformers_is_not_installed(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r'transformers, which is not installed: pip install .*-e "\.\[repa\]"'):
        encoder.load(path, GRID, WIDTH)


@pytest.mark.parametrize("name", ["no-such/model", "/no/such/directory"])
def test_a_model_that_cannot_be_found(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=rf"^cannot load encoder '{name}' \(config.data.encoder\): .*without a network"):
        encoder.load(name, GRID, WIDTH)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", None, "no file named model.safetensors"),
        ("model.safetensors", b"torn", "cannot load encoder"),
        ("config.json", b"{}", "cannot load encoder .*Unrecognized model"),
        ("config.json", b"{", "config.json.* is not a valid JSON file"),
        ("config.json", b'{"model_type": "bert", "hidden_size": 16}', "is a bert; give one of dinov2 or "),
    ],
)
def test_a_model_that_cannot_be_read(path, tmp_path, file, content, words):
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=words):
        encoder.load(str(tmp_path), GRID, WIDTH)


def test_weights_that_are_missing_or_of_other_shapes(path, tmp_path):
    model = transformers.Dinov2Model.from_pretrained(path)
    state = {name: value for name, value in model.state_dict().items() if name != "layernorm.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match="lacks layernorm.weight: give a complete copy"):
        encoder.load(str(tmp_path), GRID, WIDTH)
    model.save_pretrained(tmp_path, state_dict=state | {"layernorm.weight": torch.ones(3)})
    with pytest.raises(UserError, match="cannot load encoder"):
        encoder.load(str(tmp_path), GRID, WIDTH)
