"""Pickled arrays: as they were, with nothing executed; anything else is refused by name."""

import collections
import copyreg
import functools
import os
import pathlib
import pickle
import pickletools
import struct

import numpy as np
import pytest
import torch
import torch.distributed._shard.sharded_tensor.metadata as shard_metadata
import torch.distributed.checkpoint.metadata as dcp_metadata

from meanflow.errors import UserError
from meanflow.weights import folders, pickles

X = np.random.default_rng(0).normal(size=(4, 3, 2)).astype(np.float32)
ARRAYS = {
    "float32": X, "float16": X.astype(np.float16), "big endian": X.astype(">f8"), "by columns": np.asfortranarray(X),
    "a view": X[::2, 1:], "int64": np.arange(5), "bool": X > 0, "scalar": np.int64(7), "no axes": np.array(2.5),
}  # fmt: skip
TENSORS = {
    "float32": torch.tensor(X), "bfloat16": torch.tensor(X).bfloat16(), "a row": torch.tensor(X)[2],
    "transposed": torch.tensor(X).permute(2, 0, 1), "label": torch.tensor(3), "int64": torch.arange(4),
}  # fmt: skip
PROTOCOLS = range(6)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name, protocol):
    array = ARRAYS[name]
    found = pickles.loads(pickle.dumps({"moments": array, "label": 3, "name": "a"}, protocol), "a")
    assert found["label"] == 3 and found["name"] == "a"
    assert found["moments"].dtype == array.dtype and found["moments"].shape == array.shape
    np.testing.assert_array_equal(found["moments"], array)
    np.testing.assert_array_equal(pickles.loads(pickle.dumps(array, protocol), "a"), array)


@pytest.mark.parametrize("core", ["core", "_core"])
def test_arrays_of_older_numpy(core):
    content = pickle.dumps(X, 2).replace(b"numpy._core", b"numpy." + core.encode())
    np.testing.assert_array_equal(pickles.loads(content, "a"), X)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name, protocol):
    tensor = TENSORS[name]
    found = pickles.loads(pickle.dumps(collections.OrderedDict(moments=tensor), protocol), "a")["moments"]
    expected = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("value", [5, "text", None, 2.5, b"bytes", {}])
def test_plain_values(value):
    assert pickles.loads(pickle.dumps(value), "a") == value


class Touch:
    """Makes a file as soon as it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Evil:
    """Calls something when unpickled."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("place", ["alone", "beside", "in a storage", "in an object array"])
def test_nothing_is_executed(place, protocol, tmp_path):
    mark = tmp_path / "executed"
    touch = Touch(mark)
    whole = {
        "alone": touch,
        "beside": {"moments": X, "more": touch},
        "in a storage": {"moments": Evil(torch._utils._rebuild_tensor_v2, (
            Evil(torch.storage._load_from_bytes, (pickle.dumps(touch, 2),)), 0, (1,), (1,), False, {}
        ))},
        "in an object array": {"moments": np.array([touch, None], object)},
    }[place]  # fmt: skip
    content = pickle.dumps(whole, protocol)
    with pytest.raises(UserError, match="^record 5 is refused|^cannot read record 5 as a pickle"):
        pickles.loads(content, "record 5")
    assert not mark.exists()
    if place != "in a storage":
        pickle.loads(content)
        assert mark.exists()  # it would have been


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ((eval, ("1",)), "eval"),
        ((getattr, (dict, "get")), "getattr"),
        ((functools.partial, (print,)), "functools.partial"),
        ((np.load, ("a.npy",)), "numpy.load"),
        ((torch.load, ("a.pt",)), "torch.*load"),
        ((pathlib.Path, ("a",)), "Path"),
        ((np.dtype, ("O",)), "cannot read a"),
    ],
)
def test_names_that_no_array_needs(call, name):
    with pytest.raises(UserError, match=name):
        pickles.loads(pickle.dumps({"moments": Evil(*call)}), "a")


def test_what_only_networks_call_is_refused_among_arrays():
    for module, name in pickles.NETWORKS.keys() - pickles.ARRAYS.keys():
        with pytest.raises(UserError, match=f"a is refused: it calls '{module}.{name}', which no array needs"):
            pickles.loads(f"c{module}\n{name}\n(tR.".encode(), "a")


def test_object_arrays_are_refused():
    with pytest.raises(UserError, match="cannot read a as .*an array of 'O8', not of numbers"):
        pickles.loads(pickle.dumps({"moments": np.array([1, "a"], object)}), "a")
    with pytest.raises(UserError, match="cannot read a as .*not of numbers"):
        pickles.loads(pickle.dumps(np.zeros(2, [("a", "f4")])), "a")


def test_containers_are_refused():
    for value in ([X], {"a": [1]}, {"a": {"b": {"c": {"d": X}}}}, {1, 2}):
        with pytest.raises(UserError, match="cannot read a as|a is refused"):
            pickles.loads(pickle.dumps(value), "a")


def test_dicts_of_dicts():
    found = pickles.loads(pickle.dumps({"a": {"b": {"c": X}}, "n": 1}), "a")
    np.testing.assert_array_equal(found["a"]["b"]["c"], X)
    assert found["n"] == 1


def test_damage():
    """Each prefix of a pickle, and each with a byte altered: an array, or an error of the user's."""
    content = pickle.dumps({"moments": X[:2], "label": 3})
    for end in range(len(content)):
        with pytest.raises(UserError, match="cannot read record 1 as"):
            pickles.loads(content[:end], "record 1")
    refused = 0
    for place in range(len(content)):
        altered = bytearray(content)
        altered[place] ^= 0x15
        try:
            pickles.loads(bytes(altered), "a")
        except UserError:
            refused += 1
    assert refused > 50


def test_a_storage_without_its_elements(monkeypatch):
    """Which would be memory of this process."""
    loaded = torch.UntypedStorage(1000)
    typed = torch.storage.TypedStorage(wrap_storage=loaded, dtype=torch.float32, _internal=True)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: typed)
    with pytest.raises(UserError, match="storage lacks elements"):
        pickles.loads(pickle.dumps(torch.tensor(X)), "a")


@pytest.mark.parametrize(
    ("size", "stride", "offset"), [((25,), (1,), 0), ((4,), (1,), 21), ((9999,), (0,), 0), ((-1,), (1,), 0)]
)
def test_a_tensor_beyond_its_storage(size, stride, offset):
    storage = Evil(torch.storage._load_from_bytes, torch.tensor(X)._typed_storage().__reduce__()[1])
    whole = Evil(torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, {}))
    with pytest.raises(UserError, match="cannot read a as a pickle"):
        pickles.loads(pickle.dumps(whole), "a")


def test_opcodes_that_refer_outside():
    copyreg.add_extension("os", "system", 77)
    try:
        for content in (b"\x80\x02\x82M(U\x02lsR.", b"\x80\x02\x8277.", b"cos\nsystem\n(S'ls'\ntR."):
            with pytest.raises(UserError, match="a is refused|cannot read a"):
                pickles.loads(content, "a")
        with pytest.raises(UserError, match="opcode EXT1 refers to what is not in the file"):
            pickles.loads(b"\x80\x02\x82M.", "a")
    finally:
        copyreg.remove_extension("os", "system", 77)
    with pytest.raises(UserError, match="opcode PERSID"):
        pickles.loads(b"P1\n.", "a")


def test_claims_of_more_than_there_is():
    """Which the C unpickler would allocate: 32 GB for a place in its memo."""
    for content, words in (
        (b"\x80\x02K\x01r\xff\xff\xff\xff.", "memo 4294967295 after 2 opcodes"),
        (b"\x80\x05\x8e" + struct.pack("<Q", 2**40) + b"ab.", "expected 1099511627776 bytes"),
    ):
        with pytest.raises(UserError, match=f"cannot read a as .*{words}"):
            pickles.loads(content, "a")


@pytest.mark.parametrize("name", sorted({name for name in pickles.ARRAYS if name[0] != "collections"}), ids=str)
def test_classes_cannot_be_altered(name):
    """A state for a class, not for an object, would stay for all pickles that come later."""
    before = {key: dict(vars(record)) for key, record in pickles.ARRAYS.items()}
    module, attribute = (part.encode() for part in name)
    for state in (b"(dS'args'\nI1\ns", b"N(dS'args'\nI1\nst"):
        content = b"c" + module + b"\n" + attribute + b"\n" + (b"(" if state.startswith(b"N") else b"") + state + b"b."
        list(pickletools.genops(content))
        with pytest.raises(UserError):
            pickles.loads(content, "a")
    assert {key: dict(vars(record)) for key, record in pickles.ARRAYS.items()} == before


class Got:
    """Pickles as a call of getattr, as Python 3.11.0 to 3.11.3 pickle a member of an enumeration."""

    def __init__(self, *args):
        self.args = args

    def __reduce__(self):
        return getattr, self.args


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("enum", [dcp_metadata._MEM_FORMAT_ENCODING, shard_metadata.MEM_FORMAT_ENCODING])
def test_members_of_the_enumerations_of_torch_distributed_by_name(enum, protocol):
    allowed = pickles.Matching(folders.METADATA, folders.ENUMS)
    for value in (Got(enum, "TORCH_CHANNELS_LAST"), enum.TORCH_CHANNELS_LAST):
        assert isinstance(pickles.load_records(pickle.dumps(value, protocol), allowed), pickles.Record)


@pytest.mark.parametrize(
    "args",
    [
        (dcp_metadata._MEM_FORMAT_ENCODING, "__class__"), (dcp_metadata._MEM_FORMAT_ENCODING, "mro"),
        (dcp_metadata.Metadata, "TORCH_CHANNELS_LAST"), ("text", "A"), (dcp_metadata._MEM_FORMAT_ENCODING, "A", 1),
        (Got(dcp_metadata._MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST"), "A"),
    ],
)  # fmt: skip
def test_nothing_else_is_got_by_name(args):
    with pytest.raises(UserError, match="it calls 'builtins.getattr'"):
        pickles.load_records(pickle.dumps(Got(*args)), pickles.Matching(folders.METADATA, folders.ENUMS))
