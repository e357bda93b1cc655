"""Directories that are no checkpoint are refused in one line, saying what they are."""

import json
import pickle

import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import torch.distributed.checkpoint as dcp

from meanflow.commands import snapshots
from meanflow.config.workdir import open_workdir
from meanflow.errors import UserError
from parity import convert
from torch_impl import weights
from torch_impl.step import build_net


def diffusers(path):
    (path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    (path / "diffusion_pytorch_model.safetensors").write_bytes(b"0")


def torch_file(path):
    torch.save({"a": torch.ones(2)}, path / "epoch 1")
    (path / "log.txt").write_text("loss 1")


def several_files(path):
    for i in range(4):
        torch.save({"a": torch.ones(2)}, path / f"{i}.pt")


def distributed(path):
    dcp.save({"a": torch.ones(2)}, checkpoint_id=path, no_dist=True)


def split(path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def not_an_index(path):
    (path / "model.safetensors.index.json").write_text("{}")


def outside(path):
    index = {"weight_map": {"a": "../../other.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def calls_code(path):
    distributed(path)
    (path / ".metadata").write_bytes(pickle.dumps(print))


def half(path):
    distributed(path)
    (path / ".metadata").unlink()


def two_models(path):
    for name in ("model.safetensors", "model_1.safetensors"):
        (path / name).write_bytes(b"0")


def orbax_steps(path):
    for step in (5, 10):
        ocp.PyTreeCheckpointer().save(path / str(step), {"a": np.ones(2)})


def orbax_without_names(path):
    ocp.PyTreeCheckpointer().save(path / "5", [np.ones(2)])


def orbax_damaged(path):
    ocp.PyTreeCheckpointer().save(path / "5", {"a": np.ones(2)})
    (path / "5" / "_METADATA").write_text("{")


def one_checkpoint(path):
    (path / "checkpoints" / "jax" / "5").mkdir(parents=True)
    (path / "config.json").write_text("{}")


CASES = {
    "empty": (lambda path: None, "", "an Orbax checkpoint: it is empty$"),
    "notes": (lambda path: (path / "a.md").write_text("a"), "", "has neither checkpoints/jax, checkpoints/torch nor"),
    "diffusers": (diffusers, "", r"diffusers saved it \(AutoencoderKL\); .* latents\.vae"),
    "pipeline": (lambda path: (path / "model_index.json").write_text("{}"), "", r"diffusers saved it \(a pipeline\)"),
    "one file": (torch_file, "", "name the file of weights in it, .*epoch 1$"),
    "several files": (several_files, "", r"name the file of weights in it, .*0\.pt or .*1\.pt or .*2\.pt \(4 in all\)"),
    "distributed": (distributed, "", "no network of this project has such weights"),
    "distributed, code": (calls_code, "", r"\.metadata is refused: it calls 'builtins\.print'"),
    "distributed, half": (half, "", "torch.distributed without its .metadata: copy the whole folder"),
    "split": (split, "", "names model-00001-of-00002.safetensors, which is not beside it: copy the whole folder"),
    "split, no index": (not_an_index, "", "an index of weights: KeyError"),
    "split, outside": (outside, "", "which is not beside it"),
    "two models": (two_models, "", "holds several models: name the file, model.safetensors or model_1.safetensors"),
    "steps": (orbax_steps, "", "holds several checkpoints, of steps 5, 10: choose one by --step"),
    "no names": (orbax_without_names, "", "Orbax checkpoint, but its content is not a tree|no network|holds no"),
    "damaged": (orbax_damaged, "", "cannot read .*5 as an Orbax checkpoint, it may be damaged"),
    "not saved": (lambda path: (path / "config.json").write_text("{}"), "", "the run has not saved yet"),
    "one checkpoint": (one_checkpoint, "checkpoints/jax/5", "is inside a work directory: name that, .*source$"),
    "checkpoints": (one_checkpoint, "checkpoints/jax", "is inside a work directory: name that, .*source$"),
    "all checkpoints": (one_checkpoint, "checkpoints", "is inside a work directory: name that, .*source$"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_what_a_directory_is(tmp_path, name):
    make, below, message = CASES[name]
    source = tmp_path / "source"
    source.mkdir()
    make(source)
    with pytest.raises(UserError, match=message) as error:
        convert.main([str(source / below), str(tmp_path / "w.safetensors")])
    assert "\n" not in str(error.value)


def test_a_work_directory_of_snapshots_alone(tiny, tmp_path):
    """Its checkpoints may have been deleted, or left behind in a copy: the steps are listed, or one is read."""
    config, source, written = tiny(), tmp_path / "source", tmp_path / "w.safetensors"
    open_workdir(source, config, "jax").close()
    net = build_net(config)
    emas = [weights.to_canonical(net, dict(net.named_parameters()))] * 2
    snapshots.write(source, config, 40, emas, weights.save)
    with pytest.raises(UserError, match="has no checkpoint, snapshots of steps 40; choose one by --step"):
        convert.main([str(source), str(written)])
    convert.main([str(source), str(written), "--step=40"])
    assert weights.load(written).keys() == emas[0].keys()
