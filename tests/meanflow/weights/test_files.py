"""Files of canonical weights: what is read, and what another file is said to be."""

import gzip
import io
import os
import pickle
import tarfile

import flax.serialization
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from meanflow.errors import UserError
from meanflow.weights import files

NUMBERS = torch.tensor([[1.0, -2.5e-3], [3.0e4, 0.0]])


def umask():
    os.umask(value := os.umask(0))
    return value


def torch_bytes(**options):
    stream = io.BytesIO()
    torch.save({"a": NUMBERS}, stream, **options)
    return stream.getvalue()


def tar_bytes():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pt"))
    return stream.getvalue()


def zip_bytes():
    stream = io.BytesIO()
    np.savez(stream, a=NUMBERS.numpy())
    return stream.getvalue()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_precision_is_read_exactly(tmp_path, dtype):
    given = {"a": NUMBERS.to(dtype), "scalar": torch.tensor(0.3).to(dtype), "none": torch.zeros(0, 3).to(dtype)}
    save_file(given, tmp_path / "w.safetensors", metadata={"latents": "{}"})
    loaded = files.load(tmp_path / "w.safetensors")
    expected = np.float64 if dtype == torch.float64 else np.float32
    assert {name: (a.shape, a.dtype) for name, a in loaded.items()} == {
        name: (tuple(a.shape), expected) for name, a in given.items()
    }
    assert all(np.array_equal(a, given[name].double().numpy()) for name, a in loaded.items())
    assert files.metadata(tmp_path / "w.safetensors") == {"latents": "{}"}


def test_a_file_may_be_written_from_itself(tmp_path):
    """Its arrays are mapped; writing leaves the old file to them, and anyone may read the new one."""
    path, arrays = tmp_path / "w.safetensors", {"b": np.arange(6.0).reshape(2, 3), "a": np.array(7, np.float32)}
    files.save(path, arrays, {"format": "canonical"})
    loaded = files.load(path)
    loaded["b"] += 1
    files.save(path, {name: a.T for name, a in loaded.items()}, {})
    np.testing.assert_array_equal(files.load(path)["b"], arrays["b"].T + 1)
    np.testing.assert_array_equal(loaded["a"], 7)
    assert files.load(path)["a"].shape == () and files.metadata(path) == {}
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_type_that_needs_scales_is_refused(tmp_path):
    save_file({"a": NUMBERS.to(torch.float8_e4m3fn)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="a is of type F8_E4M3.*  Save it in float32"):
        files.load(tmp_path / "w.safetensors")


KINDS = {
    "torch": torch_bytes,
    "torch of old": lambda: torch_bytes(_use_new_zipfile_serialization=False),
    "pickle": lambda: pickle.dumps({"a": 1}),
    "msgpack": lambda: flax.serialization.msgpack_serialize({"a": NUMBERS.numpy()}),
}


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w"])
@pytest.mark.parametrize("kind", KINDS)
def test_content_decides_what_a_file_is(tmp_path, kind, name):
    path = tmp_path / name
    path.write_bytes(KINDS[kind]())
    assert files.kind_of(path) == kind.split()[0]
    for read in (files.load, files.metadata):
        with pytest.raises(UserError, match=rf"it is a .*Convert it first:  python -m parity\.convert {path} .*\.saf"):
            read(path)


def test_a_converted_file_never_replaces_its_source(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(torch_bytes())
    with pytest.raises(UserError, match=r"w\.safetensors .*w_canonical\.safetensors$"):
        files.load(path)


def test_safetensors_of_any_name_are_read(tmp_path):
    save_file({"a": NUMBERS}, tmp_path / "w.pt")
    assert files.kind_of(tmp_path / "w.pt") == "safetensors"
    np.testing.assert_array_equal(files.load(tmp_path / "w.pt")["a"], NUMBERS)


OTHERS = {
    "empty": (lambda: b"", "is empty"),
    "gzip": (lambda: gzip.compress(torch_bytes()), "compressed by gzip: unpack it first"),
    "tar": (tar_bytes, "a tar archive: unpack it first"),
    "zip": (zip_bytes, "a zip archive that torch.save did not write"),
    "lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "the pointer of a file in Git LFS"),
    "page": (lambda: b"\n<!DOCTYPE html><html>", "a web page"),
    "text": (lambda: b"no weights", "is neither safetensors, a PyTorch file, a pickle nor a Flax msgpack file"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_file_of_another_kind_is_named(tmp_path, other):
    content, message = OTHERS[other]
    (tmp_path / "w.pt").write_bytes(content())
    for read in (files.kind_of, files.load):
        with pytest.raises(UserError, match=message):
            read(tmp_path / "w.pt")


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(UserError, match="it is a directory"):
        files.load(tmp_path)
