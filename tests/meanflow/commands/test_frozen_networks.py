"""What a framework hands over: which decoder a model gets, and rows that several processes put together."""

import numpy as np
import processes
import pytest
from absl import flags, logging

from configs import digits
from meanflow.commands import frozen_networks, sample
from meanflow.commands.frozen_networks import FrozenNetworks
from meanflow.config import latents
from meanflow.data.latents.autoencoder import Files
from meanflow.errors import UserError
from meanflow.process_group import ALONE, gather_rows, pack, unpack

FRAMEWORK = FrozenNetworks(lambda files, convention: ("decodes", files, convention), lambda path, convention: None)


@pytest.fixture
def config():
    """Return the config of a model of latents, with an autoencoder."""
    config = digits.get_config()
    config.model.channels = 4
    config.latents.update(latents.CONVENTIONS["edm2"]._asdict(), vae="the/config's")
    return config


@pytest.fixture
def read(monkeypatch):
    """Return the names of the autoencoders that are read; each has latents of four channels."""
    names = []

    def read(name):
        names.append(name)
        return Files({"latent_channels": 4}, {}, name)

    monkeypatch.setattr(frozen_networks.autoencoder, "read", read)
    return names


def test_a_trainer_has_no_flag_and_decodes_by_its_config(config, read):
    assert "vae" not in flags.FLAGS
    files = Files({"latent_channels": 4}, {}, "the/config's")
    assert frozen_networks.decoder(config, FRAMEWORK) == ("decodes", files, latents.CONVENTIONS["edm2"])
    config.latents.vae = ""
    assert frozen_networks.decoder(config, FRAMEWORK) is None and read == ["the/config's"]


def test_the_flag_goes_before_the_config(config, read, parse_flags):
    parse_flags(sample.define_saving_flags)
    frozen_networks.decoder(config, FRAMEWORK)
    parse_flags(sample.define_saving_flags, "--vae=a/flag's")
    _, files, convention = frozen_networks.decoder(config, FRAMEWORK)
    assert files.digest == "a/flag's" and convention == latents.CONVENTIONS["edm2"]
    assert read == ["the/config's", "a/flag's"]


def test_an_empty_flag_leaves_latents_as_they_are(config, read, parse_flags):
    parse_flags(sample.define_saving_flags, "--vae=")
    assert frozen_networks.decoder(config, FRAMEWORK) is None and not read


def test_a_model_of_pixels_has_nothing_to_decode(read, parse_flags):
    config = digits.get_config()
    for argv in ((), ("--vae=",)):
        parse_flags(sample.define_saving_flags, *argv)
        assert frozen_networks.decoder(config, FRAMEWORK) is None
    parse_flags(sample.define_saving_flags, "--vae=some/vae")
    with pytest.raises(UserError, match=r"^--vae decodes latents, but this model makes images: .*scale is \(\)$"):
        frozen_networks.decoder(config, FRAMEWORK)
    assert not read


def test_latents_of_other_channels(config, read):
    config.model.channels = 16
    with pytest.raises(UserError, match="the/config's has latents of 4 channels, the model has 16: name .* by --vae"):
        frozen_networks.decoder(config, FRAMEWORK)


def test_an_autoencoder_that_is_not_there(config, tmp_path, monkeypatch):
    """It stops a command, and leaves the pictures of a training run undecoded."""
    logged = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: logged.append(text % args))
    config.latents.vae = str(tmp_path / "vae")
    with pytest.raises(UserError, match=f"there is no directory {config.latents.vae}"):
        frozen_networks.decoder(config, FRAMEWORK)
    assert frozen_networks.try_decoder(config, FRAMEWORK) is None
    assert len(logged) == 1 and f"not decoded: there is no directory {config.latents.vae}" in logged[0]


def test_a_training_run_decodes_its_pictures(config, read, monkeypatch):
    monkeypatch.setattr(logging, "warning", lambda *args: pytest.fail("a warning"))
    assert frozen_networks.try_decoder(config, FRAMEWORK) == frozen_networks.decoder(config, FRAMEWORK) is not None
    config.latents.vae = ""
    assert frozen_networks.try_decoder(config, FRAMEWORK) is None


def batch(indices):
    """Return rows of these samples, each of which shows its index."""
    indices = np.array(indices)
    images = np.broadcast_to(indices[:, None, None].astype(np.uint8), (len(indices), 2, 3))
    return {"indices": indices, "images": images, "labels": -indices.astype(np.int32)}


@pytest.mark.parametrize("parts", [[[[0, 1], [4, 5], [2, 3]]], [[[0, 1], [4, 5]], [[2, 3]]], [[[4]], [[3, 5, 0]], [],
                                   [[2], [1]]]])  # fmt: skip
def test_rows_come_in_the_order_of_their_indices(parts):
    """Of one, two and four processes, of which one has none; in the first one."""
    rows, *others = processes.run(
        len(parts), lambda group: gather_rows([batch(i) for i in parts[group.process]], group)
    )
    assert set(rows) == {"indices", "images", "labels"} and not any(others)
    for name, expected in batch(range(6)).items():
        np.testing.assert_array_equal(rows[name], expected)
        assert rows[name].dtype == expected.dtype


def test_a_process_alone_sends_nothing():
    group = ALONE._replace(gather=lambda part: pytest.fail("it gathers"))
    np.testing.assert_array_equal(gather_rows([batch([1, 0])], group)["indices"], [0, 1])
    assert (ALONE.process, ALONE.num_processes, ALONE.gather(b"a")) == (
        0,
        1,
        [b"a"],
    )


def test_bytes_keep_every_bit():
    arrays = {"a": np.array([[np.nan, 1 / 3]], np.float32), "none": np.zeros((0, 4), np.uint8), "text": np.array("é")}
    again = unpack(pack(arrays))
    assert list(again) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array)
        assert again[name].dtype == array.dtype and again[name].shape == array.shape
    assert unpack(pack({})) == {}


def test_bytes_are_never_executed():
    with pytest.raises(ValueError, match="allow_pickle=False"):
        unpack(pack({"a": np.array([None])}))
