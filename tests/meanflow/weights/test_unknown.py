"""Weights of no network of this project: the error names the file, what it seems to be, and the nearest names."""

import flax.serialization
import numpy as np
import pytest
import torch

import torch_impl
from meanflow.errors import UserError
from meanflow.weights import reading, unknown
from parity import check, convert
from parity.golden import fixtures

OTHERS = {
    "pixel MeanFlow": ["x_embedder.proj1.weight", "u_heads.0.attn.q_proj.weight"],
    "Stable Diffusion": ["model.diffusion_model.input_blocks.0.0.weight"],
    "a U-Net of diffusers": ["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
    "a transformer of diffusers": ["pos_embed.proj.weight", "transformer_blocks.0.attn1.to_q.weight"],
    "a vision transformer": ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight"],
    "a language model": ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"],
    "a LoRA": ["transformer.blocks.0.attn.qkv.lora_A.weight"],
}


def save(path, names):
    torch.save({name: torch.ones(2, 2) for name in names}, path)
    return path


@pytest.mark.parametrize("what", OTHERS)
def test_what_it_seems_to_be(what, tmp_path):
    path = save(tmp_path / "other.pt", OTHERS[what])
    with pytest.raises(UserError, match=rf"^{path}: the weights lack .*; it seems to be {what}"):
        torch_impl.load(path)
    with pytest.raises(UserError, match=rf"^{path}: .*it seems to be {what}"):
        convert.convert(path, tmp_path / "w.safetensors")


def test_five_pairs_of_names_the_nearest_first():
    wanted = [f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "norm")]
    found = ["layers.0.attn.qkv", "layers.1.attn.qkv", "blocks.0.mlp.w1", "blocks.0.norms", "blocks.7.attention.proj",
             "zzz", "blocks.2.mlp.fc_2"]  # fmt: skip
    assert unknown.nearest(found, wanted).split(", ") == [
        "blocks.2.mlp.fc_2 (for blocks.0.mlp.fc2)", "blocks.0.norms (for blocks.0.norm)",
        "blocks.2.mlp.fc_2 (for blocks.0.mlp.fc1)", "blocks.7.attention.proj (for blocks.0.attn.proj)",
        "layers.0.attn.qkv (for blocks.0.attn.qkv)",
    ]  # fmt: skip
    assert len(unknown.nearest(found, [*wanted, "blocks.0.attn.q"]).split(", ")) == unknown.MOST


def test_nothing_is_near():
    assert unknown.describe(["zz"], ["a.weight"]) == ""


def test_names_that_differ_from_the_config_s(tmp_path):
    """As a network of the same kind with two names changed."""
    weights = fixtures.Fixture(check.GOLDEN / "sit_torch.npz").under("param/")
    changed = {n.replace("attn.proj", "attn.out_proj"): torch.from_numpy(np.array(a)) for n, a in weights.items()}
    torch.save(changed, tmp_path / "w.pt")
    near = r"attn\.out_proj\.bias \(for blocks\.0\.attn\.proj\.bias\)"
    with pytest.raises(UserError, match=rf"^{tmp_path}/w.pt: the weights lack blocks.0.attn.proj.bias, .*{near}"):
        torch_impl.load(tmp_path / "w.pt", num_heads=4)


def test_a_flax_tree(tmp_path):
    tree = {"net": {"x_embedder": {"proj": {"kernel": np.ones((2, 2))}}, "y_embedder": {"table": np.ones(2)}}}
    (tmp_path / "w.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    near = r"x_embedder/proj/kernel \(for x_embedder\.proj\.weight\)"
    with pytest.raises(UserError, match=rf"^{tmp_path}/w.msgpack: 'y_embedder/table' is not a .*{near}"):
        reading.read(tmp_path / "w.msgpack")


def test_a_file_that_is_cut_short(tmp_path):
    path = save(tmp_path / "w.pt", [f"blocks.{i}.weight" for i in range(50)])
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=f"cannot read {path} as a PyTorch file: .*cut short or damaged: copy it again"):
        reading.read(path)
