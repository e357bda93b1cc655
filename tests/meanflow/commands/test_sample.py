"""Sampling with a sampler of the test: what is asked of it, what comes of the flags, and what is written."""

import functools
import itertools
import json

import numpy as np
import PIL.Image
import processes
import pytest
import tiny

from configs import digits
from meanflow.commands import frozen_networks
from meanflow.commands import sample as sampling
from meanflow.commands.frozen_networks import FrozenNetworks
from meanflow.config import latents
from meanflow.errors import UserError
from meanflow.process_group import ALONE, ProcessGroup
from meanflow.sampling import grids, noise
from meanflow.weights import fitting

NETWORKS = FrozenNetworks(lambda files, convention: None, lambda path, convention: None)


@pytest.fixture
def config():
    return digits.get_config()


@pytest.fixture
def improved():
    return tiny.compose({"model.name": "imf_dit", "method.name": "improved"})


@pytest.fixture
def parse(parse_flags):
    """Return a function that parses sampling flags."""
    return functools.partial(parse_flags, sampling.define_sample_flags)


class Sampler:
    """Returns its weights times all the noise, plus the label; remembers guidance and shapes it was called with."""

    def __init__(self):
        self.calls, self.fresh = [], []

    def __call__(self, weights, noise, y, c, fresh):
        self.calls.append((noise.shape, y.shape, c.get("omega"), c.interval))
        self.fresh.append(None if fresh is None else fresh.shape)
        factors = np.arange(2, 2 + (0 if fresh is None else len(fresh)), dtype=np.float32)
        noise = noise + (0 if fresh is None else np.tensordot(factors, fresh, 1))
        return weights * noise + y[:, None, None, None].astype(np.float32)


@pytest.mark.parametrize("sampler", ["euler", "restart"])
def test_samples_do_not_depend_on_the_batching(config, sampler):
    config.sample.update(sampler=sampler, steps=3)
    whole, labels = sampling.generate(config, Sampler(), 2.0, 7)
    assert whole.shape == (7, 8, 8, 1) and whole.dtype == np.float32
    assert labels.shape == (7,) and labels.dtype == np.int32 and len(set(labels)) > 1
    for size in (1, 3, 7):
        config.sample.batch_size = size
        images, again = sampling.generate(config, Sampler(), 2.0, 7)
        np.testing.assert_array_equal(images, whole)
        np.testing.assert_array_equal(again, labels)
    config.sample.seed = 1
    assert np.abs(sampling.generate(config, Sampler(), 2.0, 7)[0] - whole).min() > 0


def test_every_batch_has_one_shape_and_the_guidance_of_the_config(improved):
    improved.sample.update(batch_size=3, omega=4.0, interval=(0.25, 0.5))
    sampler = Sampler()
    sampling.generate(improved, sampler, 1.0, 7)
    assert sampler.calls == [((3, 8, 8, 1), (3,), 4.0, (0.25, 0.5))] * 3
    sampler.calls.clear()
    sampling.generate(improved, sampler, 1.0, 2)
    assert sampler.calls == [((2, 8, 8, 1), (2,), 4.0, (0.25, 0.5))]


def test_noise_is_drawn_anew_for_every_step_but_the_last(config):
    config.sample.update(sampler="ctm", steps=3, batch_size=3)
    sampler = Sampler()
    sampling.generate(config, sampler, 1.0, 7)
    assert sampler.fresh == [(2, 3, 8, 8, 1)] * 3
    config.sample.update(sampler="euler")
    sampling.generate(config, sampler, 1.0, 7)
    assert sampler.fresh[3:] == [None] * 3


@pytest.mark.parametrize(
    ("changes", "num"),
    [
        ({"sampler": "euler", "steps": 4}, 0),
        ({"sampler": "heun", "steps": 4}, 0),
        ({"sampler": "restart", "steps": 4}, 3),
        ({"sampler": "ctm", "steps": 1}, 0),
        ({"sampler": "sde", "steps": 4}, 3),
        ({"sampler": "restart", "steps": 4, "times": (1.0, 0.5, 0.0)}, 1),
    ],
)
def test_how_often_a_sampler_draws_noise_anew(config, changes, num):
    config.sample.update(changes)
    assert noise.num_fresh(config.sample) == num


def test_the_noise_of_a_sample_depends_on_seed_and_index_alone():
    """The first noise and the labels are what they were before there was any drawn anew."""
    first, labels, none = noise.draw([5, 2**40], (8, 8, 1), 10, 3)
    for row, index in enumerate([5, 2**40]):
        rng = np.random.Generator(np.random.Philox(key=[3, index]))
        np.testing.assert_array_equal(first[row], rng.standard_normal((8, 8, 1), np.float32))
        assert labels[row] == rng.integers(10)
    same, same_labels, fresh = noise.draw([5, 2**40], (8, 8, 1), 10, 3, num_fresh=3)
    assert none is None and fresh.shape == (3, 2, 8, 8, 1) and fresh.dtype == np.float32
    np.testing.assert_array_equal(same, first)
    np.testing.assert_array_equal(same_labels, labels)
    fewer = noise.draw([9, 2**40, 5], (8, 8, 1), 10, 3, num_fresh=2)[2]
    np.testing.assert_array_equal(fewer[:, 2:0:-1], fresh[:2])
    every = np.concatenate([same[None], fresh]).reshape(8, -1)
    assert np.abs(np.corrcoef(every) - np.eye(8)).max() < 0.5  # none is another's
    assert abs(fresh.std() - 1) < 0.2 and np.abs(noise.draw([5], (8, 8, 1), 10, 4, 1)[2] - fresh[0, 0]).max() > 1


def test_labels_are_repeated_in_turn(config):
    config.sample.batch_size = 2
    images, labels = sampling.generate(config, Sampler(), 0.0, 5, (3, 10, 1))
    assert labels.tolist() == [3, 10, 1, 3, 10]
    np.testing.assert_array_equal(images[:, 0, 0, 0], labels)


@pytest.mark.parametrize("label", [-1, 11])
def test_labels_outside_the_classes(config, label):
    with pytest.raises(UserError, match=rf"label {label} is outside the classes 0 to 9 \(10: no class\)"):
        sampling.generate(config, Sampler(), 1.0, 5, (0, label))


def test_flags_replace_the_options_of_a_copy(improved, parse):
    improved.sample.times = (1.0, 0.5, 0.0)
    before = improved.to_dict()
    parse()
    assert sampling.override(improved).to_dict() == before
    parse("--omega=4", "--interval=0.25,0.5", "--steps=3", "--ema=-1", "--batch_size=9", "--seed=5")
    c = sampling.override(improved).sample
    assert (c.omega, c.interval, c.steps, c.times) == (4.0, (0.25, 0.5), 3, ())
    assert (c.ema, c.batch_size, c.seed) == (-1, 9, 5)
    assert improved.to_dict() == before


def test_times_and_scale_of_a_network_that_is_told_no_guidance(config, parse):
    parse("--times=1,0.25,0", "--cfg_scale=2")
    c = sampling.override(config).sample
    assert (c.times, c.cfg_scale) == ((1.0, 0.25, 0.0), 2.0)


def test_the_sampler_and_its_settings(config, parse):
    config.method.guidance = False
    parse("--sampler=ctm", "--shift=1.5", "--gamma=0.25", "--cfg_scale=2", "--interval=0.1,0.7")
    c = sampling.override(config).sample
    assert (c.sampler, c.shift, c.gamma, c.cfg_scale, c.interval) == ("ctm", 1.5, 0.25, 2.0, (0.1, 0.7))
    assert (config.sample.sampler, config.sample.shift, config.sample.gamma) == ("euler", 1.0, 0.5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--sampler=heun", "sample.sampler is 'heun'; choose one of euler, restart, ctm"),
        ("--gamma=1.5", "sample.gamma is 1.5; it must be at least 0 and at most 1"),
        ("--shift=-1", "sample.shift is -1.0; it must be a number above 0"),
        ("--interval=0.6,0.4", "sample.interval .* must rise"),
    ],
)
def test_samplers_of_no_sense(config, parse, argv, message):
    parse(argv)
    with pytest.raises(UserError, match=message):
        sampling.override(config)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--omega=0.5", "sample.omega is 0.5; it must be at least 1"),
        ("--interval=0.5", "sample.interval .* give two numbers"),
        ("--interval=", "sample.interval .* give two numbers"),
        ("--interval=0.1,0.2,0.3", "sample.interval .* give two numbers"),
        ("--interval=0.6,0.4", "sample.interval .* must rise"),
        ("--interval=a,1", "--interval: .*'a'"),
        ("--times=1,b", "--times: .*'b'"),
        ("--cfg_scale=2", "--cfg_scale: a model of config.method.name improved is sampled by --steps, .*, --omega"),
        ("--diffusion=elbo", "--diffusion: a model of config.method.name improved is sampled by --steps, "),
    ],
)
def test_flags_of_no_sense(improved, parse, argv, message):
    parse(argv)
    with pytest.raises(UserError, match=message):
        sampling.override(improved)


def test_guidance_for_a_network_that_is_told_none(config, parse):
    parse("--omega=2")
    with pytest.raises(UserError, match="--omega is for .* meanflow: .* --cfg_scale"):
        sampling.override(config)


def test_the_network_that_samples_has_no_head_of_v(improved):
    weights = {name: np.zeros(1) for name in ("u_heads.0.w", "v_heads.0.w", "v_heads.1.w", "v_final_layer.w")}
    config, kept = sampling.without_v_heads(improved, weights)
    assert list(kept) == ["u_heads.0.w", "v_final_layer.w"] and not config.model.v_heads
    assert sampling.without_v_heads(config, kept) == (config, kept)
    assert improved.model.v_heads and len(weights) == 4


def test_other_networks_keep_their_weights(config):
    weights = {"v_heads.0.w": np.zeros(1)}
    assert sampling.without_v_heads(config, weights) == (config, weights)


def test_sample_writes_what_the_flags_ask_for(config, parse, tmp_path, capsys):
    asked = []

    def load(*where):
        asked.append(where)
        return config, Sampler(), 0.0

    parse(f"--output={tmp_path / 'new'}", "--weights=w.safetensors", "--num_samples=3", "--labels=4,5")
    sampling.sample(load, NETWORKS)
    assert asked == [(None, "w.safetensors", None)]
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'samples.png'}\n"
    with np.load(tmp_path / "new" / "samples.npz") as file:
        assert file["labels"].tolist() == [4, 5, 4]
        np.testing.assert_array_equal(file["images"][:, 0, 0, 0], [4, 5, 4])


@pytest.mark.parametrize(
    ("network", "argv", "message"),
    [
        ("dit", ("--weights=w",), "--output is missing"),
        ("dit", (), "--workdir is missing"),
        ("dit", ("--weights=w", "--output=o", "--labels=1,x"), "--labels: .*'x'"),
        ("unet", ("--weights=w", "--output=o", "--labels=1"), "is unconditional"),
    ],
)
def test_mistakes_are_named_before_anything_is_sampled(parse, network, argv, message):
    sampler, config = Sampler(), tiny.compose({"model.name": network})
    parse(*argv)
    with pytest.raises(UserError, match=message):
        sampling.sample(lambda *_: (config, sampler, 1.0), NETWORKS)
    assert not sampler.calls


def test_an_output_that_cannot_be_written(config, parse, tmp_path):
    """Found before weights are read."""
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "new"):
        parse(f"--output={output}", "--weights=w.safetensors")
        with pytest.raises(UserError, match=f"cannot write {output}/samples.npz: Not a directory"):
            sampling.sample(lambda *_: pytest.fail("it loads"), NETWORKS)


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file"):
        sampling.write(tmp_path / "file", np.zeros((1, 8, 8, 1)), np.zeros(1))


@pytest.fixture
def of_latents(config, monkeypatch):
    """Return the config of a model of latents, whose autoencoder `quarter` stands for."""
    monkeypatch.setattr(
        frozen_networks.autoencoder,
        "read",
        lambda name: frozen_networks.autoencoder.Files({"latent_channels": 4}, {}, ""),
    )
    config.model.channels = 4
    config.latents.update(latents.CONVENTIONS["imm"]._asdict(), vae="some/vae")
    return config


def quarter(files, convention):
    """Return what makes images of twice the side of latents, by the scale that it is told."""
    return lambda z: np.repeat(np.repeat(z[..., :3], 2, axis=1), 2, axis=2) * convention.scale[0]


@pytest.mark.parametrize("kind", ["png", "npz", ""])
def test_samples_of_latents_are_decoded_and_kept(of_latents, parse, tmp_path, capsys, kind):
    framework = NETWORKS._replace(make_decoder=quarter)
    argv = [f"--output={tmp_path}", "--weights=w", "--num_samples=3", "--labels=4,5"]
    parse(*argv, *([f"--save={kind}"] if kind else []))
    sampling.sample(lambda *_: (of_latents, lambda weights, noise, *_: noise, None), framework)
    noise = sampling.generate(of_latents, lambda weights, noise, *_: noise, None, 3)[0]
    images = quarter(None, latents.CONVENTIONS["imm"])(noise)
    with np.load(tmp_path / "samples.npz") as file:
        np.testing.assert_array_equal(file["latents"], noise)
        np.testing.assert_array_equal(file["images"], images)
    assert capsys.readouterr().out == f"{tmp_path / 'samples.png'}\n"
    np.testing.assert_array_equal(PIL.Image.open(tmp_path / "samples.png"), grids.grid(images))
    saved = {"png": [*(f"{i:06d}.png" for i in range(3)), "dataset.json"], "npz": ["samples_uint8.npz"], "": []}[kind]
    assert {path.name for path in tmp_path.iterdir()} == {"samples.png", "samples.npz", *saved}
    if kind == "png":
        np.testing.assert_array_equal(PIL.Image.open(tmp_path / "000002.png"), grids.to_uint8(images[2]))
        assert json.loads((tmp_path / "dataset.json").read_text())["labels"][1] == ["000001.png", 5]
    if kind == "npz":
        with np.load(tmp_path / "samples_uint8.npz") as file:
            np.testing.assert_array_equal(file["arr_0"], grids.to_uint8(images))
            assert file["arr_1"].tolist() == [4, 5, 4]


def test_latents_that_are_left_as_they_are(of_latents, parse, tmp_path):
    parse(f"--output={tmp_path}", "--weights=w", "--num_samples=2", "--vae=")
    sampling.sample(lambda *_: (of_latents, Sampler(), 1.0), NETWORKS)
    with np.load(tmp_path / "samples.npz") as file:
        assert set(file.files) == {"images", "labels"} and file["images"].shape == (2, 8, 8, 4)


def test_latents_are_not_saved_as_images(of_latents, parse, tmp_path):
    parse(f"--output={tmp_path}", "--weights=w", "--vae=", "--save=png")
    with pytest.raises(UserError, match="--save writes images, but the samples have 4 channels: name the autoencoder"):
        sampling.sample(lambda *_: (of_latents, lambda *_: pytest.fail("it samples"), 1.0), NETWORKS)


def test_images_that_nothing_decodes_are_saved_too(config, parse, tmp_path):
    parse(f"--output={tmp_path}", "--weights=w", "--num_samples=2", "--save=npz")
    sampling.sample(lambda *_: (config, Sampler(), 0.1), NETWORKS)
    with np.load(tmp_path / "samples_uint8.npz") as file:
        expected = sampling.generate(config, Sampler(), 0.1, 2)[0]
        np.testing.assert_array_equal(file["arr_0"], grids.to_uint8(expected))


@pytest.mark.parametrize("num", [1, 2, 5])
def test_processes_take_the_same_batches_in_turn(config, num):
    """Of five the last has none, and the first gets all."""
    config.sample.update(batch_size=3, sampler="restart", steps=2)
    whole, labels = sampling.generate(config, Sampler(), 2.0, 10)
    samplers = [Sampler() for _ in range(num)]

    def share(group):
        return list(sampling.batches(config, samplers[group.process], 2.0, 10, (), group))

    found = processes.run(num, share)
    assert [[list(i) for i, _, _ in parts] for parts in found] == [
        [list(range(start, min(start + 3, 10))) for start in range(0, 10, 3)[process::num]] for process in range(num)
    ]
    assert {call[:2] for sampler in samplers for call in sampler.calls} == {((3, 8, 8, 1), (3,))}
    for indices, images, y in itertools.chain(*found):
        np.testing.assert_array_equal(images, whole[indices])
        np.testing.assert_array_equal(y, labels[indices])
    (images, y), *others = processes.run(num, lambda group: sampling.generate(config, Sampler(), 2.0, 10, (), group))
    np.testing.assert_array_equal(images, whole)
    np.testing.assert_array_equal(y, labels)
    assert (images.dtype, y.dtype) == (np.float32, np.int32)
    assert all(len(images) == len(y) == 0 and images.ndim == 4 for images, y in others)


def test_processes_that_sample_together_have_all_batches(config):
    config.sample.batch_size = 3
    together = ProcessGroup(1, 2, together=True)
    alone, found = (list(sampling.batches(config, Sampler(), 2.0, 7, (), group)) for group in (ALONE, together))
    assert len(alone) == len(found) == 3
    for expected, part in zip(alone, found, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(expected, part, strict=True))
    with pytest.raises(AssertionError, match="call `batches`"):
        sampling.generate(config, Sampler(), 2.0, 7, (), together)


def test_labels_in_turn_do_not_depend_on_the_processes(config):
    config.sample.batch_size = 2
    found = processes.run(2, lambda group: sampling.generate(config, Sampler(), 0.0, 7, (3, 10, 1), group))
    assert found[0][1].tolist() == [3, 10, 1, 3, 10, 1, 3]


def test_weights_of_the_same_latents(of_latents):
    fitting.check_latents(of_latents, "w", {})
    fitting.check_latents(digits.get_config(), "w", {"other": "x"})
    fitting.check_latents(of_latents, "w", {"latents": json.dumps(latents.to_dict(latents.CONVENTIONS["imm"]))})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(latents.to_dict(latents.CONVENTIONS["sd"])),
         r"^the config \(config.latents\) has .* 'imm' .* but w.safetensors has latents of the convention 'sd' "),
        ("{", "^w.safetensors has damaged metadata about its latents .*: convert it again"),
        ("[]", r"^w.safetensors has damaged metadata about its latents \(\[\] is not a latent convention"),
    ],
)  # fmt: skip
def test_weights_of_other_latents(of_latents, text, message):
    with pytest.raises(UserError, match=message):
        fitting.check_latents(of_latents, "w.safetensors", {"latents": text})


def test_weights_of_latents_for_a_model_of_pixels(config):
    theirs = {"latents": json.dumps(latents.to_dict(latents.CONVENTIONS["sd"]))}
    with pytest.raises(UserError, match="config.latents.* has no latents, but w has latents of the convention 'sd'"):
        fitting.check_latents(config, "w", theirs)
