"""Networks under the names that other codes give them: each has the arrays of the official one, by canonical names."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from benchmarks import weights as writers
from meanflow.errors import UserError
from meanflow.weights import dialects, reading
from meanflow.weights.infer import inferred_config
from parity import check
from parity.golden import fixtures

FILES = {  # the recorded network, and the file of another code
    "fastgen": ("sit_torch", writers.of_fastgen, "its model.ema_9999, named as in NVlabs/FastGen"),
    "imf": ("imf_dit_torch", writers.of_diffusers_imf, "named as in iMF-diffusers"),
    "legacy": ("dmf_sit_torch", writers.of_legacy_repa, "its ema, named as in REPA's --legacy"),
}


def fixture(name):
    return fixtures.Fixture(check.GOLDEN / f"{name}.npz")


def canonical(name):
    return {n.removeprefix("net."): a for n, a in fixture(name).under("param/").items()}


def same(found, expected):
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", FILES)
def test_the_arrays_are_those_of_the_official_network(kind, tmp_path):
    name, write, message = FILES[kind]
    found = reading.read(write(fixture(name), tmp_path))
    assert same(found.weights, canonical(name))
    assert found.kind.endswith(message)
    assert inferred_config(found.weights, 8).model.depth == inferred_config(canonical(name), 8).model.depth


@pytest.mark.parametrize("name", [name for name, _, _ in FILES.values()])
def test_official_names_stay(name):
    weights = canonical(name)
    assert dialects.translate(weights, "file") == (weights, "")


def test_no_two_names_become_one():
    """`adaLN_modulation` is two things in FastGen, `linear` stands within `linear` in diffusers."""
    for name, write in (("sit_torch", writers.FASTGEN_NAMES), ("imf_dit_torch", writers.DIFFUSERS_NAMES)):
        theirs = writers.renamed(fixture(name), write)
        assert len(theirs) == len(canonical(name)) and len(theirs.keys() - canonical(name).keys()) > 20


@pytest.mark.filterwarnings("ignore")
def test_fastgen_in_parts(tmp_path, capsys):
    """With FSDP, FastGen saves each network by torch.distributed, in a folder ITERATION.net_model."""
    path = writers.of_fastgen(fixture("sit_torch"), tmp_path)
    net = torch.load(path)["model"]["ema_9999"]
    dcp.save(net, checkpoint_id=tmp_path / "0000100.net_model", no_dist=True)
    assert same(reading.read(tmp_path / "0000100.net_model").weights, canonical("sit_torch"))
    assert "logvar_linear.bias, logvar_linear.weight" in capsys.readouterr().err
    raw = reading.read(path, reading.Choice(ema=-1)).weights
    assert all(np.array_equal(raw[name], a + 1) for name, a in canonical("sit_torch").items())


def test_a_teacher_of_fastgen_is_refused(tmp_path):
    """Its config alone says what it predicts, and whether its time is multiplied by 1000."""
    path = writers.of_fastgen(fixture("sit_torch"), tmp_path)
    net = torch.load(path)["model"]["net"]
    torch.save({n: a for n, a in net.items() if not n.startswith("r_embedder.")}, path)
    with pytest.raises(UserError, match=r"0000100.pth holds a DiT of FastGen without r_embedder, a teacher"):
        reading.read(path)


def sit(tmp_path, kind="SiTTransformer2DModel"):
    """Write a flow model without a sigma into a folder of diffusers whose config.json names a class."""
    weights = {n: a for n, a in writers.torch_weights(fixture("dmf_sit_torch")).items() if "projectors" not in n}
    folder = tmp_path / "SiT-B-2-256" / "transformer"
    folder.mkdir(parents=True)
    (folder.parent / "model_index.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"_class_name": kind}))
    safetensors.torch.save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder.parent


@pytest.mark.parametrize(("kind", "sign"), [("SiTTransformer2DModel", -1), ("REPATransformer", 1)])
def test_the_class_of_a_folder_tells_the_time(kind, sign, tmp_path):
    last = reading.read(sit(tmp_path, kind)).weights["final_layer.linear.weight"]
    assert np.array_equal(last, sign * canonical("dmf_sit_torch")["final_layer.linear.weight"])


def test_a_collection_of_pipelines(tmp_path):
    """Their names end in numbers, which are no steps."""
    first = sit(tmp_path / "repo")
    assert reading.read(first.parent).weights.keys() == reading.read(first).weights.keys()
    shutil.copytree(first, first.parent / "SiT-XL-2-256")
    with pytest.raises(UserError, match="repo holds several pipelines of diffusers: name one, .*SiT-B.* or .*SiT-XL"):
        reading.read(first.parent)
