"""Image files: read from any source, evaluated in any number of processes, and made into statistics of real ones."""

import functools
import io
import json
import threading
import zipfile

import numpy as np
import PIL.Image
import processes
import pytest
from absl import flags

from meanflow.commands import evaluate, evaluate_images
from meanflow.commands.frozen_networks import FrozenNetworks
from meanflow.config import options
from meanflow.data.images import pictures
from meanflow.errors import UserError
from meanflow.metrics import references, scores
from meanflow.metrics.extractor import Extractor
from meanflow.process_group import ALONE

NUM, SIDE = 10, 6
IMAGES = np.random.default_rng(0).integers(0, 256, (NUM, SIDE, SIDE, 3), np.uint8)


def features(images):
    """Return the mean of each channel, [b 3]."""
    return (images.astype(np.float32) / 255).mean((1, 2))


def make_inception(path, convention):
    assert path == "w"
    return lambda images: {"pool": features(images), "logits": 9 * features(images)}


FRAMEWORK = FrozenNetworks(lambda *_: pytest.fail("nothing is decoded"), make_inception)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(evaluate_images, "BATCH", 3)


@pytest.fixture
def npz(tmp_path):
    np.savez(tmp_path / "images.npz", IMAGES, np.arange(NUM))
    return tmp_path / "images.npz"


@pytest.fixture
def folder(tmp_path):
    for i, image in enumerate(IMAGES):
        path = tmp_path / "images" / f"class{i // 6}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(path)
    return tmp_path / "images"


@pytest.fixture
def config():
    """Return a config whose metric is the Inception score; its networks are those above."""
    config = options.get_config()
    config.evaluation.update(metrics=("is",), inception="w")
    return config


@pytest.fixture
def parse(parse_flags):
    """Return a function that parses the flags of an evaluation."""
    return functools.partial(parse_flags, evaluate.define_flags)


def start(config):
    return ALONE


def test_images_of_an_npz(npz):
    source = evaluate_images.NpzImages(str(npz))
    assert len(source) == NUM and source.name(3) == f"{npz}[3]"
    np.testing.assert_array_equal(source.read(3), IMAGES[3])


def test_grey_images_become_red_green_and_blue(tmp_path):
    """Which the crop needs, as do networks."""
    np.savez(tmp_path / "grey.npz", IMAGES[..., :1])
    source = evaluate_images.NpzImages(str(tmp_path / "grey.npz"))
    np.testing.assert_array_equal(source.read(1), IMAGES[1, ..., :1].repeat(3, axis=2))
    assert evaluate_images.read(source, 1, 4).shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, "cannot read the images of .*arr_0"),
        ({"arr_0": IMAGES.astype(np.float32)}, r"arr_0 of float32 \(10, 6, 6, 3\), not uint8"),
        ({"arr_0": IMAGES[0]}, r"arr_0 of uint8 \(6, 6, 3\), not uint8 \[n h w 1 or 3\]"),
        ({"arr_0": IMAGES[..., :2]}, r"arr_0 of uint8 \(10, 6, 6, 2\), not uint8 \[n h w 1 or 3\]"),
        ({"arr_0": IMAGES[:0]}, r"a.npz has no images, arr_0 is of shape \(0, 6, 6, 3\)"),
        ({"arr_0": np.array([None])}, "cannot read the images of .*allow_pickle=False"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        evaluate_images.NpzImages(str(tmp_path / "a.npz"))


def altered():
    """Return an .npz of which the compressed bytes are not what was written."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, arr_0=IMAGES)
    with zipfile.ZipFile(buffer) as file:
        start = file.infolist()[0].header_offset + 60
    content = bytearray(buffer.getvalue())
    content[start : start + 40] = b"\xff" * 40
    return bytes(content)


def an_array():
    buffer = io.BytesIO()
    np.save(buffer, IMAGES)
    return buffer.getvalue()


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 torn", b"text", altered(), an_array()])
def test_files_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "a.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="^cannot read the images of .*a.npz: .*  It needs arr_0, as --save=npz"):
        evaluate_images.NpzImages(str(path))


def test_features_of_all_images(npz, config):
    config.evaluation.metrics = ("kid",)
    whole = evaluate_images.collect(evaluate_images.NpzImages(str(npz)), config, FRAMEWORK, None, ALONE)
    assert whole.count == NUM
    np.testing.assert_array_equal(whole.rows("pool"), features(IMAGES))


@pytest.mark.parametrize("num", [2, 5])
def test_processes_share_the_images(folder, config, num):
    """Of five the last has no batch."""
    config.evaluation.metrics = ("kid", "is")
    source, seen = pictures.open_pictures(str(folder)), []
    extract = make_inception("w", "")
    framework = FRAMEWORK._replace(make_inception=lambda *_: lambda images: seen.append(len(images)) or extract(images))
    whole, *others = processes.run(num, lambda group: evaluate_images.collect(source, config, framework, None, group))
    assert sorted(seen) == [1, 3, 3, 3] and others == [None] * (num - 1)
    np.testing.assert_array_equal(whole.rows("pool"), features(IMAGES))
    np.testing.assert_array_equal(whole.rows("logits"), 9 * features(IMAGES))


@pytest.mark.parametrize("name", ["class0/1.png", "class1/7.png"])
def test_images_of_several_sizes(folder, config, name):
    """In one batch, and in two."""
    PIL.Image.fromarray(np.zeros((9, 12, 3), np.uint8)).save(folder / name)
    source = pictures.open_pictures(str(folder))
    words = rf"class0/0.png \(6, 6, 3\) and {name} \(9, 12, 3\) \(h w c\) differ in size: give --image_size"
    with pytest.raises(UserError, match=words):
        evaluate_images.collect(source, config, FRAMEWORK, None, ALONE)
    config.evaluation.metrics = ("kid",)
    whole = evaluate_images.collect(source, config, FRAMEWORK, 4, ALONE)
    expected = np.stack([pictures.centre_crop(source.read(i), 4) for i in range(NUM)])
    np.testing.assert_array_equal(whole.rows("pool"), features(expected))


@pytest.mark.parametrize("num", [2, 4])
def test_images_of_several_sizes_in_several_processes(folder, config, num):
    """Each process has images of one size, and that of the other ones refuses."""
    for i in range(3, 6):
        PIL.Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "class0" / f"{i}.png")
    source = pictures.open_pictures(str(folder))

    refused = {}

    def process(group):
        try:
            evaluate_images.collect(source, config, FRAMEWORK, None, group)
        except UserError as error:
            refused[group.process] = str(error)
            raise

    with pytest.raises((UserError, threading.BrokenBarrierError)):  # the latter in the others, once one has ended
        processes.run(num, process)
    assert refused.keys() == {1}
    assert "class0/0.png (6, 6, 3) and class0/3.png (9, 9, 3) (h w c) differ in size" in refused[1]


def test_an_image_is_cropped_only_if_asked(npz):
    source = evaluate_images.NpzImages(str(npz))
    np.testing.assert_array_equal(evaluate_images.read(source, 2, None), IMAGES[2])
    np.testing.assert_array_equal(evaluate_images.read(source, 2, 3), pictures.centre_crop(IMAGES[2], 3))


def test_a_reference_of_a_folder(folder, config, parse, tmp_path, capsys):
    path = tmp_path / "new" / "real.npz"
    config.evaluation.update(metrics=("fid", "kid", "is"), reference=str(path), convention="pytorch_fid")
    parse(f"--make_reference={folder}")
    evaluate_images.make_reference(FRAMEWORK, start, config)
    assert capsys.readouterr().out == f"{path}\n"
    reference, rows = references.read(path), features(IMAGES)
    np.testing.assert_allclose(reference.mean, rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(reference.covariance, np.cov(rows, rowvar=False), rtol=1e-5)
    np.testing.assert_array_equal(reference.features, rows)
    assert (reference.num_samples, reference.convention) == (NUM, "pytorch_fid")


def test_a_reference_is_for_fid_unless_metrics_are_named(npz, folder, config, parse, tmp_path):
    """And cropped by --image_size; rows are kept only for metrics that need them."""
    config.evaluation.update(metrics=(), reference=str(tmp_path / "real.npz"))
    parse(f"--make_reference={folder}", "--image_size=4")
    evaluate_images.make_reference(FRAMEWORK, start, config)
    reference = references.read(tmp_path / "real.npz")
    expected = features(np.stack([pictures.centre_crop(image, 4) for image in IMAGES]))
    np.testing.assert_allclose(reference.mean, expected.mean(0), rtol=1e-6)
    assert reference.features is None


def test_a_large_reference_keeps_the_features_of_some(folder, config, parse, tmp_path, monkeypatch):
    """Drawn from all, the same ones by any number of processes; mean and covariance are of all."""
    monkeypatch.setattr(evaluate_images, "KEPT", 4)
    parse(f"--make_reference={folder}")
    kept, rows = [], features(IMAGES)
    for num in (1, 2):
        config.evaluation.update(metrics=("kid",), reference=str(tmp_path / f"{num}.npz"))
        processes.run(num, lambda group: evaluate_images.make_reference(FRAMEWORK, lambda config: group, config))
        reference = references.read(config.evaluation.reference)
        np.testing.assert_allclose(reference.mean, rows.mean(0), rtol=1e-6)
        assert reference.num_samples == NUM
        kept.append(reference.features)
    np.testing.assert_array_equal(kept[0], kept[1])
    (drawn,) = np.nonzero((rows[:, None] == kept[0]).all(-1).any(1))
    assert len(kept[0]) == len(drawn) == 4 and drawn.max() > 4


def test_a_reference_of_both_networks(folder, config, parse, tmp_path, monkeypatch):
    monkeypatch.setattr(
        evaluate_images.image_metrics.dino, "load", lambda name: lambda x: {"dino": features(x)[:, :2] + len(name)}
    )
    config.evaluation.update(metrics=("fd_dinov2", "kid"), reference=str(tmp_path / "real.npz"), dino="dir")
    parse(f"--make_reference={folder}")
    evaluate_images.make_reference(FRAMEWORK, start, config)
    dino, inception = (references.read(tmp_path / "real.npz", metric) for metric in ("fd_dinov2", "fid"))
    np.testing.assert_allclose(dino.mean, features(IMAGES)[:, :2].mean(0) + 3, rtol=1e-6)
    np.testing.assert_allclose(inception.mean, features(IMAGES).mean(0), rtol=1e-6)
    assert dino.features is None and inception.features is not None


def test_only_the_first_process_writes_the_reference(folder, config, parse, tmp_path, capsys, monkeypatch):
    written, write = [], references.write
    monkeypatch.setattr(references, "write", lambda path, kinds: written.append(path) or write(path, kinds))
    config.evaluation.update(metrics=("fid",), reference=str(tmp_path / "real.npz"))
    parse(f"--make_reference={folder}")
    processes.run(3, lambda group: evaluate_images.make_reference(FRAMEWORK, lambda config: group, config))
    assert written == [config.evaluation.reference] and capsys.readouterr().out == f"{tmp_path / 'real.npz'}\n"
    np.testing.assert_allclose(references.read(written[0]).mean, features(IMAGES).mean(0), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": ""}, "--make_reference needs --reference=FILE.npz, the file to write"),
        ({"reference": "real.pkl"}, "--make_reference needs --reference=FILE.npz"),
        ({"inception": ""}, "--make_reference needs --inception, the weights that python -m parity.convert makes"),
        ({"metrics": ("fvd",)}, "fvd: unknown metric"),
        ({"metrics": ("is",)}, "--make_reference: the metric `is` needs no real images; name others by --metrics"),
    ],
)
def test_what_a_reference_needs(config, parse, folder, changes, message):
    config.evaluation.update({"metrics": ("fid",), "reference": "real.npz"} | changes)
    parse(f"--make_reference={folder}")
    with pytest.raises(UserError, match=message):
        evaluate_images.make_reference(FRAMEWORK, lambda config: pytest.fail("it starts"), config)


@pytest.mark.parametrize("size", [None, 4])
def test_a_reference_tells_the_size_of_its_images(folder, config, parse, tmp_path, size):
    config.evaluation.update(metrics=("fid",), reference=str(tmp_path / "real.npz"))
    parse(f"--make_reference={folder}", *([f"--image_size={size}"] if size else []))
    evaluate_images.make_reference(FRAMEWORK, start, config)
    assert references.read(tmp_path / "real.npz").image_size == (size or SIDE,) * 2


def test_a_reference_that_cannot_be_written(folder, config, parse, tmp_path):
    """Found before any image is read."""
    (tmp_path / "file").touch()
    config.evaluation.update(metrics=("fid",), reference=str(tmp_path / "file" / "real.npz"))
    parse(f"--make_reference={folder}")
    framework = FRAMEWORK._replace(make_inception=lambda *_: pytest.fail("weights are read"))
    with pytest.raises(UserError, match="cannot write .*file/real.npz"):
        evaluate_images.make_reference(framework, start, config)
    (tmp_path / "file").unlink()
    (tmp_path / "file" / "real.npz").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write .*file/real.npz: Is a directory"):
        evaluate_images.make_reference(framework, start, config)


def test_a_disk_that_is_full_in_the_end(folder, config, parse, tmp_path, monkeypatch):
    """The statistics are kept elsewhere, and the error says where."""
    config.evaluation.update(metrics=("fid",), reference=str(tmp_path / "new" / "real.npz"))
    parse(f"--make_reference={folder}")
    monkeypatch.setattr(evaluate_images.tempfile, "mkdtemp", lambda prefix: str(tmp_path / prefix))
    replace = references.files.replace_bytes

    def full(path, content):
        if "new" in str(path):
            raise references.files.cannot_write(path, OSError(28, "No space left on device"))
        replace(path, content)

    monkeypatch.setattr(references.files, "replace_bytes", full)
    other = tmp_path / "reference_" / "real.npz"
    with pytest.raises(UserError, match=f"cannot write .*new/real.npz: No space .*  The statistics are in {other}"):
        evaluate_images.make_reference(FRAMEWORK, start, config)
    np.testing.assert_allclose(references.read(other).mean, features(IMAGES).mean(0), rtol=1e-6)


@pytest.fixture
def reference(tmp_path, config):
    """Return features of real images, to whose statistics the config compares."""
    rows = np.random.default_rng(1).uniform(0.4, 0.6, (20, 3)).astype(np.float32)
    path = tmp_path / "reference.npz"
    references.write(path, references.Reference(rows.mean(0), np.cov(rows, rowvar=False), 20, rows, "torch_fidelity"))
    config.evaluation.update(metrics=("fid", "kid"), reference=str(path))
    return rows


@pytest.mark.parametrize("kind", ["npz", "folder"])
@pytest.mark.parametrize("num", [1, 2])
def test_samples_are_evaluated(kind, num, reference, config, parse, request, capsys):
    parse(f"--samples={request.getfixturevalue(kind)}")
    processes.run(num, lambda group: evaluate_images.evaluate_samples(FRAMEWORK, lambda config: group, config))
    kid, kid_std = scores.kernel_distance(features(IMAGES), reference, subset_size=NUM)
    expected = {"num_samples": NUM, "fid": scores.frechet_distance(features(IMAGES), reference), "kid": kid}
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == pytest.approx(
        expected | {"kid_std": kid_std, "convention": "torch_fidelity", "reference": config.evaluation.reference}
    )


def test_samples_are_cropped_by_the_flag(npz, reference, config, parse, capsys):
    config.evaluation.metrics = ("fid",)
    parse(f"--samples={npz}", "--image_size=4")
    evaluate_images.evaluate_samples(FRAMEWORK, start, config)
    rows = features(np.stack([pictures.centre_crop(image, 4) for image in IMAGES]))
    assert json.loads(capsys.readouterr().out)["fid"] == pytest.approx(scores.frechet_distance(rows, reference))


@pytest.fixture
def unread(npz, reference, config, parse, monkeypatch):
    """Return a function (metrics, message, ...): judging is refused before features are made."""

    def check(metrics, message, *argv, widths=None):
        config.evaluation.metrics = metrics
        parse(f"--samples={npz}", *argv)
        extract = Extractor(lambda images: pytest.fail("features are made"), widths or {})
        with pytest.raises(UserError, match=message):
            evaluate_images.evaluate_samples(FRAMEWORK._replace(make_inception=lambda *_: extract), start, config)

    return check


def test_samples_of_another_size_than_the_reference(unread, config):
    reference = references.read(config.evaluation.reference)
    references.write(config.evaluation.reference, reference._replace(image_size=(32, 24)))
    words = r"for fid belong to images of 32 x 24 pixels, the images have {} x {} \(h x w\): use .*--image_size={}"
    unread(("fid",), words.format(6, 6, 6))
    unread(("kid", "fid"), words.replace("fid", "kid").format(4, 4, 4), "--image_size=4")


def test_a_reference_of_unknown_size_is_told(npz, reference, config, parse, caplog):
    caplog.set_level("INFO")
    parse(f"--samples={npz}")
    evaluate_images.evaluate_samples(FRAMEWORK, start, config)
    assert "does not state the size of its images: fid and kid is meaningful only if they have 6 x 6" in caplog.text


def test_samples_and_a_reference_of_other_features(unread):
    unread(("fid",), "for fid have 3 features, but the images have 2048 of pool", widths={"pool": 2048})


def test_too_few_samples(unread, config, tmp_path, npz, parse):
    np.savez(npz, IMAGES[:3])
    unread(("fid", "pr"), "pr needs at least 4 samples, but there are 3")
    unread(("fid", "is"), "is needs at least 10 samples, but there are 3")
    np.savez(npz, IMAGES)
    few = references.read(config.evaluation.reference)
    references.write(config.evaluation.reference, few._replace(features=few.features[:3]))
    unread(("pr",), "pr needs at least 4 real images, but there are 3")


def test_samples_need_metrics(config, parse):
    config.evaluation.metrics = ()
    parse("--samples=images.npz")
    with pytest.raises(UserError, match="--samples needs --metrics: say what to measure"):
        evaluate_images.evaluate_samples(FRAMEWORK, lambda config: pytest.fail("it starts"), config)


@pytest.mark.parametrize("flag", ["make_reference", "samples"])
@pytest.mark.parametrize("other", ["steps=2", "omegas=1,2", "save=png", "vae=some/vae", "num_samples=9"])
def test_flags_of_models_are_refused(config, parse, flag, other):
    run = {"make_reference": evaluate_images.make_reference, "samples": evaluate_images.evaluate_samples}[flag]
    config.evaluation.reference = "real.npz"
    parse(f"--{flag}=images", f"--{other}")
    with pytest.raises(
        UserError, match=f"--{other.split('=')[0]} is for samples of a model, but --{flag} takes image files"
    ):
        run(FRAMEWORK, lambda config: pytest.fail("it starts"), config)


def test_samples_and_a_reference_of_another_convention(npz, reference, config, parse):
    config.evaluation.convention = "jax_meanflow"
    parse(f"--samples={npz}")
    with pytest.raises(UserError, match="of the convention torch_fidelity, but config.evaluation.convention is jax"):
        evaluate_images.evaluate_samples(FRAMEWORK, lambda config: pytest.fail("it starts"), config)


def test_the_flags(parse):
    parse()
    f = flags.FLAGS
    assert (f.make_reference, f.samples, f.split, f.image_size) == ("", "", "train", None)
    with pytest.raises(flags.IllegalFlagValueError, match="--image_size=0"):
        parse("--image_size=0")
