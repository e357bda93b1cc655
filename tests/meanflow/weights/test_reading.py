"""Folders, archives and addresses on the hub: each holds the same official network, and gives the same weights."""

import functools
import hashlib
import http.server
import json
import pathlib
import shutil
import threading
import zipfile

import flax.serialization
import huggingface_hub
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from meanflow.config import latents
from meanflow.errors import UserError
from meanflow.weights import files, names, reading
from parity import check
from parity.golden import fixtures

RAW = fixtures.Fixture(check.GOLDEN / "sit_torch.npz").under("param/")
EMA = {name: a + 1 for name, a in RAW.items()}


def tensors(weights, prefix=""):
    return {prefix + name: torch.from_numpy(np.array(a)) for name, a in weights.items()}


def same(found, expected, tables=("pos_embed",)):
    names = expected.keys() - set(tables)
    return found.keys() - set(tables) == names and all(np.array_equal(found[name], expected[name]) for name in names)


def tree(weights):
    """Return the nested Flax tree of the weights."""
    nested: dict = {}
    for name, a in names.canonical_to_flax_tree(weights).items():
        *above, leaf = name.split("/")
        functools.reduce(lambda node, part: node.setdefault(part, {}), above, nested)[leaf] = a
    return nested


def split(path, suffix=".safetensors"):
    """Two files and an index, as transformers and diffusers split large networks."""
    places = {}
    for i in (0, 1):
        name = f"model-{i + 1:05}-of-00002{suffix}"
        part = tensors(dict(list(RAW.items())[i::2]))
        safetensors.torch.save_file(part, path / name) if suffix == ".safetensors" else torch.save(part, path / name)
        places |= dict.fromkeys(part, name)
    (path / f"model{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def split_pickles(path):
    split(path, ".bin")


def accelerate(path):
    """What accelerator.save_state writes."""
    safetensors.torch.save_file(tensors(RAW, "_orig_mod."), path / "model.safetensors")
    torch.save({"state": {}}, path / "optimizer.bin")
    (path / "random_states_0.pkl").write_bytes(b"0")


def old_accelerate(path):
    torch.save(tensors(RAW, "module."), path / "pytorch_model.bin")


def pipeline(path):
    (path / "model_index.json").write_text("{}")
    for name, kind in (("vae", "AutoencoderKL"), ("transformer", "SiTTransformer2DModel")):
        (path / name).mkdir()
        (path / name / "config.json").write_text(json.dumps({"_class_name": kind}))
    safetensors.torch.save_file(tensors(RAW), path / "transformer" / "diffusion_pytorch_model.safetensors")


def distributed(path):
    dcp.save({"model": tensors(RAW), "optimizer": {"exp_avg": torch.ones(3)}, "step": 4}, checkpoint_id=path,
             no_dist=True)  # fmt: skip


def orbax(path):
    ocp.PyTreeCheckpointer().save(path / "checkpoint_20", {"params": tree(RAW)})


def old_orbax(path):
    """One msgpack file, and leaves of the optimizer that are None, as optax's masks leave them."""
    (path / "checkpoint_20").mkdir()
    state = {"params": tree(RAW), "opt_state": {"0": None, "1": {"mu": tree(RAW), "nu": None}}, "step": 20}
    (path / "checkpoint_20" / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(state))
    (path / "checkpoint_20" / "_METADATA").write_text("{}")


MAKERS = {
    f.__name__: f for f in (split, split_pickles, accelerate, old_accelerate, pipeline, distributed, orbax, old_orbax)
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_a_folder_gives_its_weights(tmp_path, name, packed):
    source = tmp_path / "release" / "network"
    source.mkdir(parents=True)
    MAKERS[name](source)
    if packed:  # with and without the folder around it
        source = pathlib.Path(shutil.make_archive(str(tmp_path / "w"), "zip", source.parent if "o" in name else source))
        shutil.rmtree(tmp_path / "release")
    assert same(reading.read(source).weights, RAW)
    assert not packed or list(tmp_path.iterdir()) == [source]


def test_an_archive_of_one_file(tmp_path):
    torch.save({"model": tensors(RAW), "ema": tensors(EMA)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.pt", "release/a.pt")
    assert same(reading.read(tmp_path / "a.zip").weights, EMA)
    assert same(reading.read(tmp_path / "a.zip", reading.Choice(ema=-1)).weights, RAW)
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "b.zip").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cannot read .*/b\.zip as .* it is cut short or damaged: copy it again"):
        reading.read(tmp_path / "b.zip")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for step in (10, 20):
            archive.write(tmp_path / "a.pt", f"release/checkpoint_{step}/a.pt")
    with pytest.raises(UserError, match=rf"^{tmp_path}/d\.zip holds several checkpoints, of steps 10, 20: .* --step"):
        reading.read(tmp_path / "d.zip")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("release/a.txt", "no weights")
    with pytest.raises(UserError, match="neither safetensors, a PyTorch file"):
        reading.read(tmp_path / "c.zip")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", [("10", "20"), ("checkpoint_10", "checkpoint_20")])
def test_one_of_several_steps(tmp_path, names):
    for name, weights in zip(names, (RAW, EMA), strict=True):
        ocp.PyTreeCheckpointer().save(tmp_path / name, {"params": tree(weights)})
    with pytest.raises(UserError, match="several checkpoints, of steps 10, 20: choose one by --step"):
        reading.read(tmp_path)
    assert same(reading.read(tmp_path, reading.Choice(step=20)).weights, EMA)
    assert same(reading.read(tmp_path, reading.Choice(step=10)).weights, RAW)
    with pytest.raises(UserError, match="no checkpoint of step 7, only 10, 20"):
        reading.read(tmp_path, reading.Choice(step=7))


@pytest.mark.filterwarnings("ignore")
def test_a_tree_of_several_emas(tmp_path):
    state = {"params": tree(RAW), "ema_params": tree(EMA), "ema_params1": tree({n: a + 2 for n, a in RAW.items()})}
    ocp.PyTreeCheckpointer().save(tmp_path / "checkpoint_5", state)
    found = [reading.read(tmp_path, reading.Choice(ema=ema)) for ema in (None, -1, 0, 1)]
    for source, offset in zip(found, (1, 0, 1, 2), strict=True):
        assert same(source.weights, {name: a + offset for name, a in RAW.items()}), source.kind
    assert [source.kind.partition(", its ")[2] for source in found] == [
        "ema_params",
        "params",
        "ema_params",
        "ema_params1",
    ]


@pytest.mark.filterwarnings("ignore")
def test_only_the_chosen_tensors_are_read(tmp_path, monkeypatch):
    """The optimizer of a large run is twice its weights."""
    dcp.save({"model": tensors(RAW), "ema": tensors(EMA)}, checkpoint_id=tmp_path, no_dist=True)
    asked, load = [], dcp.load

    def spy(state, **options):
        asked.extend(state)
        load(state, **options)

    monkeypatch.setattr(dcp, "load", spy)
    found = reading.read(tmp_path)
    assert same(found.weights, EMA) and "its ema" in found.kind
    assert len(asked) == len(RAW) and all(name.startswith("ema.") for name in asked)


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub, for the files of one folder; owner/name is its only repository."""

    root: pathlib.Path
    asked: list

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        path = self.path.partition("?")[0]
        self.asked.append(path)
        sha = "0123456789" * 4
        if path.startswith("/api/models/owner/name"):
            files = [str(p.relative_to(self.root)) for p in sorted(self.root.rglob("*")) if p.is_file()]
            content: object = {"id": "owner/name", "sha": sha, "siblings": [{"rfilename": f} for f in files]}
            if "/tree/" in path:
                content = [{"type": "file", "path": f, "size": (self.root / f).stat().st_size, "oid": f} for f in files]
            body = json.dumps(content).encode()
            return self.send(200, body, {"Content-Type": "application/json"}, with_body)
        prefix = next(
            (p for p in (f"/owner/name/resolve/{r}/" for r in ("main", "v1", sha)) if path.startswith(p)), None
        )
        if prefix is None:
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, with_body)
        file = self.root / path.removeprefix(prefix)
        if not file.is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}, with_body)
        content = file.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        return self.send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": sha}, with_body)

    def send(self, status, body, headers, with_body):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve a folder as a hub, with an empty cache, and yield the folder and the paths that were asked for."""
    (tmp_path / "repo").mkdir()
    handler = type("Handler", (Hub,), {"root": tmp_path / "repo", "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    for name in ("hf_hub_download", "snapshot_download"):
        function = getattr(huggingface_hub, name)
        monkeypatch.setattr(
            huggingface_hub, name, functools.partial(function, endpoint=address, cache_dir=tmp_path / "cache")
        )
    yield tmp_path / "repo", handler.asked
    server.shutdown()
    server.server_close()


def test_a_file_on_the_hub(hub):
    root, asked = hub
    (root / "sizes").mkdir()
    torch.save({"net": tensors(RAW), "net_ema": tensors(EMA)}, root / "sizes" / "XL_2.pth")
    address = "hf://owner/name/sizes/XL_2.pth"
    assert same(reading.read(address).weights, EMA)
    num = sum(path.endswith(".pth") for path in asked)
    assert same(reading.read(address.replace("name/", "name@v1/"), reading.Choice(ema=-1)).weights, RAW)
    assert sum(path.endswith(".pth") for path in asked) <= num + 1  # asked for its hash, and taken from the cache
    with pytest.raises(UserError, match="cannot fetch hf://owner/name/none.pth: .* https://huggingface.co/owner/name;"):
        reading.read("hf://owner/name/none.pth")
    with pytest.raises(UserError, match="cannot fetch hf://owner/other/a.pth: .*; a private repository needs a token"):
        reading.read("hf://owner/other/a.pth")
    with pytest.raises(UserError, match="is not an address on the hub"):
        reading.read("hf://owner")


def test_a_folder_on_the_hub(hub):
    root, asked = hub
    pipeline(root)
    (root / "picture.png").write_bytes(b"0")
    assert same(reading.read("hf://owner/name").weights, RAW)
    assert not any(path.endswith(".png") for path in asked)
    assert same(reading.read("hf://owner/name/transformer").weights, RAW)
    with pytest.raises(UserError, match="there is no unet in owner/name"):
        reading.read("hf://owner/name/unet")


def test_without_a_network_the_cache_serves(hub, monkeypatch):
    root, _ = hub
    torch.save(tensors(RAW), root / "a.pth")
    reading.read("hf://owner/name/a.pth")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert same(reading.read("hf://owner/name/a.pth").weights, RAW)
    with pytest.raises(UserError, match="cannot fetch hf://owner/name/b.pth: .*without a network"):
        reading.read("hf://owner/name/b.pth")


def test_the_latents_that_weights_state_are_those_of_their_network(tmp_path):
    """Without a config, the published network's are assumed unless the file says others."""
    imm = latents.CONVENTIONS["imm"]
    metadata = {"source": "a test", "latents": json.dumps(latents.to_dict(imm))}
    files.save(tmp_path / "imm.safetensors", RAW, metadata)
    files.save(tmp_path / "none.safetensors", RAW, {"source": "a test"})
    found = [reading.network(tmp_path / f"{name}.safetensors", model={"num_heads": 4}) for name in ("imm", "none")]
    assert [latents.of(network.config) for network in found] == [imm, latents.CONVENTIONS["sd"]]
    with pytest.raises(UserError, match="imm.safetensors"):
        reading.network(tmp_path / "imm.safetensors", found[1].config)
