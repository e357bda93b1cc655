"""Which network of a checkpoint is read, whatever its trainer calls its entries and wraps them in."""

import argparse
import pathlib

import flax.serialization
import flax.traverse_util
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from safetensors.torch import save_file

from configs import digits
from meanflow.commands import train
from meanflow.errors import UserError
from meanflow.weights import entries, layouts, sources
from parity import check, convert
from parity.golden import fixtures
from torch_impl import weights as canonical_files

MARK = "x_embedder.proj.weight"


def net(value, prefix=""):
    """Return a small state dict whose entries all have this value."""
    return {f"{prefix}{name}": np.full(2, value) for name in (MARK, "blocks.0.mlp.fc1.bias")}


def chosen(tree, ema, separator="."):
    """Return the value of the network that is read, its names verified."""
    network = entries.choose(tree, ema, separator, "w.pt")
    names = {MARK, "blocks.0.mlp.fc1.bias"}
    assert {name.replace("/", ".").replace("kernel", "weight") for name in network.leaves} == names
    return network.leaves["blocks.0.mlp.fc1.bias".replace(".", separator)][0]


# The checkpoints of trainers: 1 is the raw network, 2 the first EMA, 3 the second.
TREES = {
    "SiT, REPA": {"model": net(1), "ema": net(2), "opt": {"state": {0: {"exp_avg": np.ones(2)}}}, "args": None},
    "the same of DDP": {"ema": net(2, "module."), "model": net(1, "module.")},
    "model_ema": {"model_ema": net(2), "model": net(1), "epoch": 3},
    "net": {"net": net(1), "ema": net(2)},
    "AveragedModel": {"model": net(1), "averaged_model": net(2, "module.") | {"n_averaged": np.array(3)}},
    "moving average": {"model": net(1), "model_avg": net(2)},
    "several": {"ema": net(2), "ema2": net(3), "model": net(1)},
    "by decay": {"model": net(1), "ema_0.9999": net(2), "ema_0.9995": net(3)},
    "a list": {"model": net(1), "emas": [net(2), net(3)]},
    "a dict": {"model": net(1), "ema": {"0.9999": net(2), "0.99": net(3)}},
    "timm": {"state_dict": net(1, "module."), "state_dict_ema": net(2), "arch": "sit"},
    "py-meanflow": {"model": net(1, "net.") | net(2, "net_ema.") | net(3, "net_ema1."), "epoch": 3},
    "compiled": {"ema": net(2, "_orig_mod."), "model": net(1, "module._orig_mod.")},
    "lightning": {"state_dict": net(1, "model.") | net(2, "ema_model."), "global_step": 3, "loops": {}},
    "lightning callback": {"state_dict": net(1, "net."), "callbacks": {"EMA": {"ema_state_dict": net(2, "net.")}}},
    "ema-pytorch": net(1, "online_model.") | net(2, "ema_model.module.") | {"initted": np.array(True)},
    "flat": net(1, "model._orig_mod.") | net(2, "ema.module."),
    "deepspeed": {"module": net(1), "ema": net(2)},
    "optimizer by names": {
        "optimizer": {"exp_avg": net(7), "state": {MARK: {"exp_avg": np.ones(2)}}}, "model": net(1), "ema": net(2),
    },
    "with a teacher": {"teacher": net(9), "model": net(1), "ema": net(2)},
    "inside of blocks": {"model": net(1), "ema": {
        "x_embedder._fsdp_wrapped_module._orig_mod.proj.weight": np.full(2, 2),
        "blocks.0._checkpoint_wrapped_module.mlp.fc1.bias": np.full(2, 2),
    }},
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_the_entries_of_every_trainer(name):
    tree = TREES[name]
    assert chosen(tree, None) == chosen(tree, 0) == 2
    assert chosen(tree, -1) == 1
    second = {"several": 2, "by decay": 1, "a list": 1, "a dict": 1, "py-meanflow": 1}.get(name)
    if second is not None:
        assert chosen(tree, second) == 3
    for number in (5, -2):
        with pytest.raises(UserError, match=rf"w\.pt has no .*{number}.*--ema -1, 0"):
            chosen(tree, number)


def flax_net(value):
    return flax.traverse_util.unflatten_dict({f"net.{n}": a for n, a in net(value).items()}, sep=".")


@pytest.mark.parametrize("ema_name", ["ema_params", "ema", "params_ema"])
def test_flax_train_states(ema_name):
    tree = {"step": 3, "params": flax_net(1), ema_name: flax_net(2), "opt_state": {"0": {"mu": flax_net(5)}}}
    tree = flax.traverse_util.unflatten_dict(
        {
            key.replace("proj/weight", "proj/kernel"): a
            for key, a in flax.traverse_util.flatten_dict(tree, sep="/").items()
        },
        sep="/",
    )
    assert chosen(tree, None, "/") == chosen(tree, 0, "/") == 2
    assert chosen(tree, -1, "/") == 1


@pytest.mark.parametrize(
    ("tree", "ema", "message"),
    [
        ({"model": net(1)}, 0, r"has no EMA 0 \(--ema 0\), only model \(--ema -1\)"),
        ({"ema": net(1)}, -1, r"has no raw parameters \(--ema -1\), only ema \(--ema 0\)"),
        ({"ema": net(1)}, 1, r"has no EMA 1 \(--ema 1\), only ema"),
        (net(1), -1, "holds one network and does not say whether it is an EMA: leave out --ema"),
        (net(1, "module."), 0, "leave out --ema"),
        ({"first": net(1), "second": net(2)}, None, r"has several networks: first, second .*--prefix"),
        ({"model": net(1), "ema": {"shadow_params": [np.ones(2)]}}, None, "its 'ema' is not a network .* --ema -1"),
        (net(1) | net(1, "_orig_mod."), 0, "has no"),
    ],
)
def test_what_a_checkpoint_lacks_is_refused(tree, ema, message):
    with pytest.raises(UserError, match=message):
        chosen(tree, ema)


def test_what_there_is_without_an_ema_is_read():
    assert chosen({"model": net(1), "opt": {}}, None) == chosen({"model": net(1)}, -1) == 1
    assert chosen({"ema": net(2)}, None) == chosen({"ema": net(2)}, 0) == 2
    assert chosen(net(1), None) == chosen(net(1, "module._orig_mod."), None) == 1
    assert chosen({"model": net(1), "ema": {"shadow_params": [np.ones(2)]}}, -1) == 1


def test_what_belongs_to_no_network_is_named(capsys):
    tree = net(1, "model.") | {"model_loss.weight": np.ones(2), "n_averaged": np.array(3)}
    assert chosen({"state_dict": tree}, None) == 1
    assert "left out of w.pt, not part of a known network: state_dict.model_loss.weight (1 in all)" in (
        capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def sit():
    """Return canonical weights: a small official PyTorch state dict."""
    return fixtures.Fixture(check.GOLDEN / "sit_torch.npz").under("param/")


def tensors(weights, change=lambda a: a):
    return {name: change(torch.from_numpy(np.array(a))) for name, a in weights.items()}


def converted(source, tmp_path, *flags):
    convert.main([str(source), str(tmp_path / "converted.safetensors"), *flags])
    return canonical_files.load(tmp_path / "converted.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".ckpt", ".pth.tar", ".pt", ""])
@pytest.mark.parametrize("kind", ["torch", "torch of old", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
def test_content_decides_and_not_the_name(tmp_path, sit, kind, suffix, prefix):
    path, given = tmp_path / f"w{suffix}", tensors({f"{prefix}{name}": a for name, a in sit.items()})
    if kind == "safetensors":
        save_file(given, path)
    else:
        torch.save(given, path, _use_new_zipfile_serialization=kind == "torch")
    got = converted(path, tmp_path)
    assert got.keys() == sit.keys() and all(np.array_equal(got[name], a) for name, a in sit.items())


def parameters(sit):
    return {name: torch.nn.Parameter(tensor) for name, tensor in tensors(sit).items()}


def tied(sit):
    """Views of one storage."""
    flat = torch.cat([tensor.flatten() for tensor in tensors(sit).values()])
    starts = np.cumsum([0, *(a.size for a in sit.values())])
    return {name: flat[i : i + a.size].view(a.shape) for (name, a), i in zip(sit.items(), starts, strict=False)}


STATES = {
    "parameters": parameters,
    "parameters of an EMA": lambda sit: {"model": parameters(sit), "ema": parameters(sit)},
    "transposed": lambda sit: tensors(sit, lambda a: a.transpose(0, -1).contiguous().transpose(0, -1)),
    "tied": tied,
    "numpy": dict,
    "numbers of numpy": lambda sit: {"ema": tensors(sit), "loss": np.float64(0.3), "best": {"fid": np.float32(3)}},
    "arguments": lambda sit: {
        "ema": tensors(sit), "args": argparse.Namespace(path=pathlib.Path("a"), lr=np.float64(1e-4), seed=None),
    },
    "float64": lambda sit: tensors(sit, lambda a: a.double()),
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_state_dicts_of_every_making(tmp_path, sit, state):
    torch.save(STATES[state](sit), tmp_path / "w.pt")
    got = converted(tmp_path / "w.pt", tmp_path)
    assert got.keys() == sit.keys() and all(np.array_equal(got[name], a) for name, a in sit.items())


NAME = "final_layer.linear.bias"
UNFIT = {
    "quantised": (
        lambda a: torch.quantize_per_tensor(a, 0.1, 0, torch.qint8), "final_layer.linear.bias' is quantised",
    ),
    "sparse": (lambda a: a.to_sparse(), "is of torch.sparse_coo; save dense tensors"),
    "meta": (lambda a: a.to("meta"), "is without values"),
    "float8": (lambda a: a.to(torch.float8_e5m2), "is of torch.float8_e5m2, which needs scales"),
    "int8": (lambda a: a.to(torch.int8), "is of type int8: weights must be floating-point numbers"),
    "complex": (lambda a: a.to(torch.complex64), "is of type complex64"),
    "text": (lambda a: "none", "is a str, not a tensor"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", UNFIT)
def test_what_is_no_plain_tensor_is_refused(tmp_path, sit, what):
    change, message = UNFIT[what]
    given = tensors(sit)
    torch.save(given | {NAME: change(given[NAME])}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=message):
        converted(tmp_path / "w.pt", tmp_path)


class Config:
    """A class of a trainer, as hyperparameters are kept."""


@pytest.mark.parametrize("new", [True, False])
def test_a_refused_class_is_named_and_no_unsafe_way_out(tmp_path, sit, new):
    state = {"ema": tensors(sit), "config": Config()}
    torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(UserError) as error:
        converted(tmp_path / "w.pt", tmp_path)
    message = str(error.value)
    assert f"objects of '{__name__}.Config'" in message and "torch.save({'ema': ema.state_dict()}, FILE)" in message
    assert "\x1b" not in message and "\n" not in message
    assert not any(word in message for word in ("weights_only", "safe_globals", "trust"))


@pytest.mark.parametrize("kind", ["msgpack", "orbax", "orbax steps"])
def test_raw_parameters_of_flax_files(tmp_path, kind):
    dit = fixtures.Fixture(check.GOLDEN / "meanflow_dit_flax.npz").under("param/")
    config = tmp_path / "tiny.py"
    config.write_text(
        "from configs import digits\n\n\ndef get_config():\n    config = digits.get_config()\n"
        "    config.model.update(input_size=8, channels=4, num_classes=10, depth=3, width=32, num_heads=4)\n"
        "    return config\n"
    )
    raw, ema = (flax.traverse_util.unflatten_dict({n: a * k for n, a in dit.items()}, sep="/") for k in (1, 2))
    tree, path = {"step": np.int32(3), "params": raw, "ema_params": ema}, tmp_path / "state"
    if kind == "msgpack":
        path.write_bytes(flax.serialization.msgpack_serialize(tree))
    elif kind == "orbax":
        ocp.PyTreeCheckpointer().save(path, tree)
    else:
        with ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(create=True)) as manager:
            manager.save(5, args=ocp.args.StandardSave(tree))
    bias = dit["net/final_layer/linear/_flax_linear/bias"]
    for number, scale in (("-1", 1), ("0", 2)):
        got = converted(path, tmp_path, "--config", str(config), "--ema", number)
        np.testing.assert_array_equal(got["final_layer.linear.bias"], scale * bias)


@pytest.mark.parametrize(
    ("raw", "ema"), [("model", "ema"), ("model", "model_ema"), ("net", "ema"), ("state_dict", "ema")]
)
def test_raw_parameters_of_pytorch_files(tmp_path, sit, capsys, raw, ema):
    """In whichever order they stand; what was read is said."""
    halved = {name: a if name == "pos_embed" else a / 2 for name, a in sit.items()}
    torch.save({ema: tensors(sit), raw: tensors(halved), "opt": {"lr": 1}}, tmp_path / "w.pt")
    for flags, want, entry in (((), sit, ema), (("--ema", "0"), sit, ema), (("--ema", "-1"), halved, raw)):
        got = converted(tmp_path / "w.pt", tmp_path, *flags)
        assert all(np.array_equal(got[name], a) for name, a in want.items())
        assert f"w.pt (PyTorch state dict, its {entry}) -> " in capsys.readouterr().out


def test_a_part_of_a_sharded_tensor_is_refused():
    class Part(torch.Tensor):
        pass

    with pytest.raises(UserError, match="w is a Part, one part of a tensor: gather it before saving"):
        sources.to_numpy(torch.ones(2).as_subclass(Part), "w")


def test_gains_that_sharding_gave_an_axis_become_scalars(tmp_path):
    given = fixtures.Fixture(check.GOLDEN / "remeanflow_edm2_torch.npz").under("param/")
    gains = {name for name, a in given.items() if name.endswith("_gain")}
    torch.save({name: torch.from_numpy(a).reshape(1) if name in gains else torch.from_numpy(np.array(a)) for name, a in
                given.items()}, tmp_path / "w.pt")  # fmt: skip
    got = converted(tmp_path / "w.pt", tmp_path)
    assert gains and all(got[name].shape == () and got[name] == given[name] for name in gains)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_program_of_torchscript_is_named(tmp_path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)).save(tmp_path / "w.pt")
    with pytest.raises(UserError, match="w.pt is a TorchScript archive, a program: save the state dict"):
        converted(tmp_path / "w.pt", tmp_path)


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "msgpack"])
def test_other_files_to_start_from(tmp_path, sit, suffix):
    """Training starts from whatever is published, as every command reads it."""
    path = tmp_path / f"w.{suffix}"
    if suffix == "msgpack":
        path.write_bytes(flax.serialization.msgpack_serialize(layouts.flax_tree(sit)))
    else:
        torch.save({"ema": tensors(sit), "model": tensors(sit, lambda a: a + 1)}, path)
    config, got = train.read_model(str(path), digits.get_config(), read_weights=None)
    assert config is None and got.keys() >= sit.keys() - {"pos_embed"}
    assert all(np.array_equal(a, sit[name]) for name, a in got.items())
