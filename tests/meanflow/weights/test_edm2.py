"""Official EDM2 pickles: read as they are, with the code in them never run; anything else is refused by name."""

import collections
import copyreg
import functools
import io
import itertools
import operator
import os
import pathlib
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from meanflow.errors import UserError
from meanflow.weights import edm2, pickles, sources
from parity import check, convert
from torch_impl import weights

PROTOCOLS = (2, 3, 4, 5)
MARK = "executed"
RUN = f"import pathlib; pathlib.Path({MARK!r}).touch()"


class EasyDict(dict):
    """As dnnlib.util.EasyDict: attributes are entries."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _reconstruct_persistent_obj(meta):
    """Do as the official function does: execute the source."""
    exec(meta["module_src"], {})
    return types.SimpleNamespace()


class Persistent(torch.nn.Module):
    """As official persistent classes, whose objects are pickled with their source and their attributes.

    inside: whether the attributes are in meta, as official code has them, or follow it.
    """

    inside = True

    def __reduce__(self):
        inside = self.inside
        meta = {"type": "class", "version": 6, "module_src": RUN, "class_name": type(self).__name__}
        meta["state"] = self.__dict__ if inside else None
        return _reconstruct_persistent_obj, (EasyDict(meta),), None if inside else self.__dict__


class MPConv(Persistent):
    def __init__(self, *shape):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(*shape))
        self.register_parameter("bias", None)


class MPFourier(Persistent):
    def __init__(self):
        super().__init__()
        self.register_buffer("freqs", torch.randn(6))
        self.register_buffer("cache", torch.ones(2), persistent=False)


class Block(Persistent):
    inside = False

    def __init__(self):
        super().__init__()
        self.emb_gain = torch.nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(4, 3, 3, 3)
        self.conv_skip = None
        self.resample_filter, self.dtype = [1, 1], torch.float16


class UNet(Persistent):
    def __init__(self):
        super().__init__()
        self.emb_fourier = MPFourier()
        self.enc = torch.nn.ModuleDict({"8x8_conv": MPConv(4, 3, 3, 3), "8x8_block0": Block()})
        self.resample = np.float32(0.5) * np.arange(3, dtype=np.float32)


class Precond(Persistent):
    def __init__(self):
        super().__init__()
        self._init_kwargs = EasyDict(use_fp16=True, label=EasyDict(dim=10))
        self.unet, self.logvar_linear = UNet(), MPConv(1, 8)
        self.device, self.size, self.scale = torch.device("cpu"), torch.Size((3, 4)), np.float64(0.5)


@pytest.fixture(autouse=True)
def official(monkeypatch, tmp_path):
    """Make the modules of the official code importable, and run in an empty directory, where code leaves its mark."""
    for module, made in (("torch_utils.persistence", _reconstruct_persistent_obj), ("dnnlib.util", EasyDict)):
        monkeypatch.setattr(made, "__module__", module)
        package = module.partition(".")[0]
        for name in (package, module):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setattr(sys.modules[module], made.__name__, made, raising=False)
    monkeypatch.chdir(tmp_path)


def executed():
    """Return whether code has left its mark, and remove that."""
    path = pathlib.Path(MARK)
    there = path.exists()
    path.unlink(missing_ok=True)
    return there


def snapshot(net):
    """Return what official training pickles."""
    return EasyDict(
        encoder=EasyDict(scale=np.ones((1, 4, 1, 1), np.float32), kind=np.dtype("float32")),
        dataset_kwargs=EasyDict(class_name="training.dataset.ImageFolderDataset"), loss_fn=None, ema=net,
    )  # fmt: skip


def write(data, protocol=4, name="a.pkl"):
    path = pathlib.Path(name)
    path.write_bytes(data if isinstance(data, bytes) else pickle.dumps(data, protocol))
    return path


def read(data, protocol=4):
    """Return what is read; nothing may have run."""
    try:
        return edm2.read_network(write(data, protocol)).leaves
    finally:
        assert not executed()


def assert_state(got, net, dtype=np.float32):
    want = net.state_dict()
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert got[name].dtype == dtype and got[name].flags.c_contiguous
        np.testing.assert_array_equal(got[name], tensor.float().numpy())


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_network_is_read_bitwise_and_its_code_never_runs(protocol, dtype):
    net = Precond().to(dtype)
    data = snapshot(net)
    assert_state(read(data, protocol), net)
    pickle.loads(pickle.dumps(data, protocol))
    assert executed()  # as it would have


def test_the_converter_reads_it():
    net = Precond()
    source = sources.read(write(snapshot(net)), 0, "")
    assert_state(source.weights, net)
    assert source.kind == "EDM2 pickle, its ema" and source.config is None
    assert {"unet.enc.8x8_conv.weight", "unet.emb_fourier.freqs", "logvar_linear.weight"} < set(source.weights)
    assert_state(sources.read(pathlib.Path("a.pkl"), 0, "unet.").weights, net.unet)
    with pytest.raises(UserError, match="no name begins with --prefix 'vae'"):
        sources.read(pathlib.Path("a.pkl"), 0, "vae")


@pytest.mark.parametrize("entries", [("net", "ema"), ("net", "other"), None])
def test_which_network_is_read(entries):
    nets = {entry: Precond() for entry in entries or ("net",)}
    if entries is None:
        assert_state(read(nets["net"]), nets["net"])
    else:
        assert_state(read(nets), nets.get("ema", nets["net"]))


def test_the_raw_network_is_read_where_there_is_one():
    nets = {"ema": Precond(), "net": Precond()}
    for ema, entry in ((None, "ema"), (0, "ema"), (-1, "net")):
        assert_state(edm2.read_network(write(nets), ema).leaves, nets[entry])
    with pytest.raises(UserError, match=r"a\.pkl has no raw parameters \(--ema -1\), only ema \(--ema 0\)"):
        edm2.read_network(write(snapshot(nets["ema"])), -1)


def test_permuted_tensors_and_views():
    net = MPConv(2, 3, 4, 5)
    net.weight.data = net.weight.data.to(memory_format=torch.channels_last)
    net.extra = torch.nn.Parameter(torch.arange(12.0).reshape(4, 3)[1:3].T)
    assert_state(read(net), net)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"ema": None, "net": EasyDict(a=1), "first": MPConv(1), "second": MPConv(1)},
            "others under 'first', 'second'",
        ),
        ({"ema": {"unet.weight": torch.ones(2)}}, "holds no network, nor one under 'ema' or 'net'$"),
        ({}, "holds no network"),
        ([MPConv(1)], "holds no network"),
        (torch.ones(2), "holds no network"),
        (3, "holds no network"),
        (torch.nn.Sequential(), "has no parameters"),
    ],
)
def test_pickles_without_a_network(data, message):
    with pytest.raises(UserError, match=rf"a\.pkl {message}|{message}"):
        read(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "EOFError|ValueError"),
        (b"no pickle at all", "a.pkl"),
        (b"PK\x03\x04", "a.pkl"),
        (b"\x80\x04.", "cannot read"),
        (b"\x80\x09N.", "cannot read"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "memo 2147483647"),
        (b"\x80\x02Np1000000000\n.", "memo 1000000000"),
        (b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"abc.", "cannot read"),
        (b"\x80\x05\x96" + (2**60).to_bytes(8, "little") + b"abc.", "cannot read"),
        (b"\x80\x04\x8d" + (2**60).to_bytes(8, "little") + b"abc.", "cannot read"),
        (b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"N.", "cannot read|no network"),
        (b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b"abc.", "cannot read"),
        (b"I" + b"9" * 5000 + b"\n.", "cannot read"),
    ],
)
def test_files_that_are_no_pickles_or_claim_what_they_lack(content, message):
    with pytest.raises(UserError, match=message) as error:
        read(content)
    assert "a.pkl" in str(error.value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_files_that_are_cut_off(protocol):
    content = pickle.dumps(snapshot(Precond()), protocol)
    for length in {*range(0, 400), *range(400, len(content), 151), *range(len(content) - 60, len(content))}:
        with pytest.raises(UserError, match="a.pkl"):
            read(content[:length])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_altered_files_are_read_or_refused(protocol):
    content, random = pickle.dumps(snapshot(UNet()), protocol), np.random.default_rng(protocol)
    refused = 0
    for _ in range(150):
        altered = bytearray(content)
        for position in random.integers(len(content), size=random.integers(1, 4)):
            altered[position] = random.integers(256)
        try:
            read(bytes(altered))
        except UserError as error:
            refused += "a.pkl" in str(error)
    assert refused > 10


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Bag(list):
    """A class that is not in the list, whose object is filled with what runs."""

    def __reduce__(self):
        return copyreg.__newobj__, (Bag,), {"a": 1}, iter([Call(exec, RUN)])


TOUCH = f"touch {MARK}"
ATTACKS = {
    "posix.system": Call(os.system, TOUCH),
    "builtins.eval": Call(eval, f"__import__('os').system({TOUCH!r})"),
    "builtins.exec": Call(exec, RUN),
    "builtins.getattr": Call(getattr, [], "append"),
    "builtins.__import__": Call(__import__, "os"),
    "subprocess.Popen": Call(subprocess.Popen, ["touch", MARK]),
    "torch.hub.load": Call(torch.hub.load, ".", "x"),
    "torch.serialization.load": Call(torch.load, "b.pt", "cpu", None),
    "functools.partial": functools.partial(os.system, TOUCH),
    "operator.attrgetter": operator.attrgetter("system"),
    "copyreg._reconstructor": Call(copyreg._reconstructor, Bag, object, None),
    "pathlib.Path.touch": Call(pathlib.Path.touch, MARK),
    f"{__name__}.Bag": Bag(),
}
# What old protocols have of the names: those of modules are of Python 2, and a name with a dot is a call of getattr.
OLD_NAMES = {name: name.rpartition(".")[2].replace("touch", "getattr") for name in ATTACKS}
RUN_BY_PICKLE = ("posix.system", "builtins.eval", "builtins.exec", f"{__name__}.Bag")


def rebuilt(storage, offset=0, size=(2,), stride=(1,), hooks=()):
    """Return what is pickled as a tensor of these arguments."""
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, collections.OrderedDict(hooks))


def storage_of(content):
    """Return what is pickled as a storage of these bytes."""
    return Call(torch.storage._load_from_bytes, content)


def saved(data, zipped=False):
    """Return the bytes of a file of torch.save."""
    file = io.BytesIO()
    torch.save(data, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def ones(num=2):
    """Return what is pickled as a storage of ones."""
    return storage_of(torch.ones(num).__reduce_ex__(2)[1][0].__reduce__()[1][0])


def hide_in_entry(data, attack):
    data["loss_fn"] = attack


def hide_in_attribute(data, attack):
    data["ema"].unet.enc["8x8_block0"].resample_filter = attack


def hide_in_init_kwargs(data, attack):
    data["ema"]._init_kwargs["label"]["dim"] = (1, [attack])


def hide_in_module_hooks(data, attack):
    data["ema"].unet._forward_hooks[0] = attack


def hide_in_parameters(data, attack):
    data["ema"].unet.enc["8x8_conv"]._parameters["weight"] = attack


def hide_in_modules(data, attack):
    data["ema"].unet._modules["dec"] = attack


def hide_in_left_out_buffers(data, attack):
    data["ema"].unet._non_persistent_buffers_set = [attack]


def hide_in_tensor_hooks(data, attack):
    data["ema"].unet._parameters["a"] = rebuilt(ones(), hooks={"a": attack})


def hide_in_stride(data, attack):
    data["ema"].unet._parameters["a"] = rebuilt(ones(), stride=(attack,))


HIDINGS = (
    hide_in_entry, hide_in_attribute, hide_in_init_kwargs, hide_in_module_hooks, hide_in_parameters, hide_in_modules,
    hide_in_left_out_buffers, hide_in_tensor_hooks, hide_in_stride,
)  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_calls_that_are_not_in_the_list_are_refused_by_name(name):
    for hide, protocol in itertools.product(HIDINGS, PROTOCOLS):
        data = snapshot(Precond())
        hide(data, ATTACKS[name])
        with pytest.raises(UserError, match=r"a\.pkl is refused: it calls") as error:
            read(data, protocol)
        assert (name if protocol >= 4 else OLD_NAMES[name]) in str(error.value)


@pytest.mark.parametrize("name", RUN_BY_PICKLE)
def test_the_attacks_would_run(name):
    pickle.loads(pickle.dumps({"loss_fn": ATTACKS[name]}))
    assert executed()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ATTACKS)
def test_calls_within_the_bytes_of_a_storage_are_refused_by_name(name, zipped):
    data = snapshot(Precond())
    data["ema"].unet._parameters["a"] = rebuilt(storage_of(saved(ATTACKS[name], zipped)))
    with pytest.raises(UserError, match=r"'unet\.a' of a\.pkl is refused: its storage calls") as error:
        read(data)
    assert f"{OLD_NAMES[name]}'" in str(error.value)


def text(word):
    """Return the opcode of a short text."""
    return b"\x8c" + bytes([len(word)]) + word.encode()


def stacked(module, name):
    """Return the opcodes of a name from the stack."""
    return text(module.decode()) + text(name.decode()) + b"\x93"


# All opcodes that take a name and call it.
CALLS = (
    lambda module, name, args: b"c%s\n%s\n" % (module, name) + args + b"R",
    lambda module, name, args: stacked(module, name) + args + b"R",
    lambda module, name, args: stacked(module, name) + args + b"\x81",  # NEWOBJ
    lambda module, name, args: stacked(module, name) + args + b"}\x92",  # NEWOBJ_EX
    lambda module, name, args: b"(i%s\n%s\n" % (module, name),  # INST
    lambda module, name, args: b"(c%s\n%s\no" % (module, name),  # OBJ
)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"), ("torch", "load"), ("torch._utils", "_import_dotted_name"), ("builtins", "open"),
        ("torch", "os.system"), ("collections", "OrderedDict.__init__"), ("collections", "OrderedDict.fromkeys"),
        ("torch.storage", "_load_from_bytes.__globals__"), ("torch.storage", "io.open"), ("dnnlib.util", "os"),
        ("dnnlib", "util.EasyDict"), ("torch_utils.persistence", "_src_to_module"), ("torch", "storage.torch.load"),
        ("numpy", "load"), ("numpy.core.multiarray", "_reconstruct.__class__"),
        ("torch_utils.persistence", "_reconstruct_persistent_obj.__globals__"),
        ("meanflow.weights.pickles", "InertUnpickler"),
    ],
)  # fmt: skip
def test_names_beside_those_in_the_list_are_refused(module, name):
    for call in CALLS:
        with pytest.raises(UserError, match="is refused: it calls") as error:
            read(b"\x80\x04" + call(module.encode(), name.encode(), text(TOUCH) + b"\x85") + b".")
        assert f"'{module}.{name}'" in str(error.value)


def test_extensions_are_refused():
    """The unpickler of the standard library asks nobody about one that was used before."""
    copyreg.add_extension("builtins", "exec", 77)
    call = text(RUN) + b"\x85R."
    try:
        for used in (False, True):
            for name, opcode in (("EXT1", b"\x82\x4d"), ("EXT2", b"\x83\x4d\0"), ("EXT4", b"\x84\x4d\0\0\0")):
                with pytest.raises(UserError, match=f"a.pkl is refused: its opcode {name} refers"):
                    read(b"\x80\x04" + opcode + call)
            if not used:
                pickle.loads(b"\x80\x04\x82\x4d" + call)
                assert executed()
    finally:
        copyreg.remove_extension("builtins", "exec", 77)


@pytest.mark.parametrize(
    ("name", "content"),
    [("PERSID", b"Pa\n."), ("BINPERSID", b"N\x51."), ("NEXT_BUFFER", b"\x97."), ("READONLY_BUFFER", b"N\x98.")],
)
def test_what_is_outside_of_the_file_is_refused(name, content):
    with pytest.raises(UserError, match=f"its opcode {name} refers"):
        read(content)


def states():
    """Return opcodes of states: entries and slots, which replace methods, values or the class."""
    for key in ("__setstate__", "__init__", "__new__", "__class__", "args", "a"):
        entry = b"}" + text(key) + b"cbuiltins\nset\ns"
        yield from (entry, b"N" + entry + b"\x86", entry + entry + b"\x86")


def test_states_change_no_class_and_replace_no_method():
    """BUILD of a class of records, of a record and of a dict, which sets attributes of whatever lets it."""
    classes = {cls: dict(vars(cls)) for cls in {*pickles.NETWORKS.values(), pickles.Record}}
    names = {cls: b"c%s\n%s\n" % (module.encode(), name.encode()) for (module, name), cls in pickles.NETWORKS.items()}
    for state in states():
        for called in names.values():
            for opcodes in (called, called + b")R", called + b")\x81"):
                with pytest.raises(UserError, match="cannot read a.pkl|a.pkl holds no network"):
                    read(b"\x80\x04" + opcodes + state + b"b" + state + b"b.")
    assert all(dict(vars(cls)) == before for cls, before in classes.items())


def test_the_list_has_only_inert_classes():
    for made in pickles.NETWORKS.values():
        assert made in (pickles.Dict, pickles.Record) or made.__bases__ == (pickles.Record,)
        assert not hasattr(made(), "__dict__")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (rebuilt(ones(), size=(2**60,)), "out of bounds"),
        (rebuilt(ones(), size=(2**60,), stride=(0,)), "not dense"),
        (rebuilt(ones(), size=(2**62, 2), stride=(2**62, 1)), "overflow"),
        (rebuilt(ones(), size=(2**64,)), "is damaged"),
        (rebuilt(ones(), size=(3,)), "out of bounds"),
        (rebuilt(ones(), size=(-1,)), "is damaged"),
        (rebuilt(ones(), offset=1), "out of bounds"),
        (rebuilt(ones(), offset=-1), "invalid storage offset"),
        (rebuilt(ones(), offset=2**63 - 1), "is damaged"),
        (rebuilt(ones(), stride=(-1,), offset=1), "Negative strides"),
        (rebuilt(ones(), stride=(2**61,)), "is damaged"),
        (rebuilt(ones(), stride=(2,)), "out of bounds"),
        (rebuilt(ones(4), size=(2, 2), stride=(1, 1)), "not dense"),
        (rebuilt(ones(4), size=(2,), stride=(2,)), "not dense"),
        (rebuilt(ones(), stride=()), "is damaged"),
        (rebuilt(ones(), size=None), "is damaged"),
        (rebuilt(ones(), size=EasyDict(a=1)), "is damaged"),
        (rebuilt(ones(), stride=(torch.float32,)), "is damaged"),
        (rebuilt(None), "is not a tensor"),
        (rebuilt(torch.ones(2)), "is not a tensor"),
        (rebuilt(storage_of(saved(torch.ones(2)))), "its storage is a Tensor"),
        (rebuilt(storage_of(saved({"a": 1}))), "its storage is a dict"),
        (rebuilt(storage_of(saved(torch.ones(2).untyped_storage()))), "UntypedStorage"),
        (rebuilt(storage_of(b"")), "is damaged"),
        (rebuilt(storage_of(b"no storage")), "its storage holds more than numbers"),
        (rebuilt(storage_of(3)), "is damaged"),
        (rebuilt(Call(torch.storage._load_from_bytes)), "is damaged"),
        (rebuilt(Call(torch.storage._load_from_bytes, b"", b"")), "is damaged"),
        (Call(torch._utils._rebuild_tensor_v2), "is not a tensor"),
        (Call(torch._utils._rebuild_parameter), "is not a tensor"),
        (Call(torch._utils._rebuild_parameter, Call(torch._utils._rebuild_parameter, 3)), "is not a tensor"),
        (np.ones(2), "is not a tensor"),
        ([1.0], "is not a tensor"),
    ],
)
def test_tensors_that_are_none(tensor, message):
    net = MPConv(2)
    net._parameters["a"] = tensor
    with pytest.raises(UserError, match=rf"'a' of a\.pkl .*{message}"):
        read({"ema": net})


@pytest.mark.parametrize("num", [2**60, 2**33, 1235, 1233, -1])
def test_storages_that_claim_what_they_lack(num):
    """The count of the elements in the pickle of a storage, that before the elements, both, and no elements at all."""
    content = torch.arange(1234.0).__reduce_ex__(2)[1][0].__reduce__()[1][0]
    counts = [(b"M\xd2\x04", b"\x8a\x09" + num.to_bytes(9, "little", signed=True))]
    counts.append(((1234).to_bytes(8, "little"), num.to_bytes(8, "little", signed=True)))
    claims = [content.replace(*count) for count in counts]
    claims += [claims[0].replace(*counts[1]), claims[0][: claims[0].rindex(b"\x80\x02]")] + b"\x80\x02]."]
    assert len({content, *claims}) == 5
    for claim in claims:
        net = MPConv(2)
        net._parameters["a"] = rebuilt(storage_of(claim))
        with pytest.raises(UserError, match="'a' of a.pkl is"):
            read(net)


def in_itself(net):
    net.unet._modules["again"] = net


def twice(net):
    net._modules["again"] = net.unet


def shared(net):
    net._parameters["a"], net._parameters["b"] = 2 * [rebuilt(ones())]


def views(net):
    storage = ones()
    net._parameters["a"] = rebuilt(storage)
    net._parameters["b"] = rebuilt(storage_of(storage.call[1][0]), size=(1,))


def no_module(net):
    net._modules["a"] = torch.ones(2)


def dotted(net):
    net._parameters["unet.enc"] = None


def no_names(net):
    net._buffers[3] = None


def no_dict(net):
    net.unet._buffers = [1]


def no_set(net):
    net.unet._non_persistent_buffers_set = 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_itself, "'unet.again' of its network is in it twice"),
        (twice, "'again' of its network is in it twice"),
        (shared, "another tensor has the same storage"),
        (views, "another tensor has the same storage"),
        (no_module, "'a' of its network is not a module"),
        (dotted, "of '' of its network, _parameters is not a dict of names"),
        (no_names, "of '' of its network, _buffers is not a dict of names"),
        (no_dict, "of 'unet' of its network, _buffers is not a dict of names"),
        (no_set, "of 'unet' of its network, _non_persistent_buffers_set is not a set"),
    ],
)
def test_networks_of_another_structure(change, message):
    for protocol in PROTOCOLS:
        net = Precond()
        change(net)
        with pytest.raises(UserError, match=message):
            read({"ema": net}, protocol)


def test_a_meta_of_another_type_is_no_network():
    meta = {"type": "function", "state": Precond().__dict__}
    for args in ((meta,), (meta, meta), (), (3,)):
        with pytest.raises(UserError, match="holds no network"):
            read({"ema": Call(_reconstruct_persistent_obj, *args)})


class Node(Persistent):
    """A module that holds what it is given."""


def network_of(arrays):
    """Return a network of persistent modules with weights {name: array}; frequencies and phases are buffers."""
    net = Node()
    for name, a in arrays.items():
        *modules, leaf = name.split(".")
        node = net
        for module in modules:
            if module not in node._modules:
                node.add_module(module, Node())
            node = node._modules[module]
        tensor = torch.from_numpy(a.copy())
        if leaf in ("freqs", "phases"):
            node.register_buffer(leaf, tensor)
        else:
            node.register_parameter(leaf, torch.nn.Parameter(tensor))
    return net


@pytest.mark.parametrize(("file", "prefix"), [("edm2_reflow_torch", "param/"), ("edm2_reflow_torch", "param_gnet/")])
def test_an_official_network_becomes_canonical_weights(file, prefix):
    """With the weights of the fixtures, which `convert` fits to our network by names and shapes."""
    with np.load(check.GOLDEN / f"{file}.npz") as fixture:
        arrays = {key.removeprefix(prefix): fixture[key] for key in fixture.files if key.startswith(prefix)}
    path = write(snapshot(network_of(arrays)))
    assert convert.convert(path, "teacher.safetensors") == ("EDM2 pickle, its ema", len(arrays))
    assert not executed()
    converted = weights.load("teacher.safetensors")
    assert converted.keys() == arrays.keys()
    assert all(
        converted[name].tobytes() == a.tobytes() and converted[name].shape == a.shape for name, a in arrays.items()
    )
