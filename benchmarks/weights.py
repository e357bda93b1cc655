"""Reads every published kind of weights into both frameworks and writes docs/weights.md.

    python benchmarks/weights.py            (the table: half a minute)
    python benchmarks/weights.py --full     (and a file of SiT-XL/2, 675 million parameters: memory and seconds)

Each row is a file, written as the official code writes it, of a small official network whose output was recorded: the
weights are read by `jax_impl.load` and `torch_impl.load`, and their outputs compared with the recorded ones.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from meanflow.errors import exit_on_user_error
from parity import check, convert
from parity.golden import fixtures
from parity.golden.network import nhwc

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs/weights.md"
BOUND = 2e-5  # of the recorded outputs, as in parity/golden
HEAD = """# Weights of other codes

Made by `python benchmarks/weights.py{full}`.  Each row is a file as the named code writes it, of a small network of
that code whose output was recorded with it.  Errors are those of the velocity that `jax_impl.load` and
`torch_impl.load` give from the file, relative to the recorded one.  *Writes back*: the option of `parity/convert.py`
whose file holds the same arrays, bit for bit.  Rows of names alone hold the network above them under the names that the
other code gives it.
"""


class Row(NamedTuple):
    """One kind of file."""

    source: str
    file: str
    fixture: str
    write: Callable[[fixtures.Fixture, pathlib.Path], pathlib.Path]  # -> the path to load
    options: dict[str, Any] = {}  # noqa: RUF012  what the weights of a small network do not show
    output: str = "u"
    back: str = ""  # --for


def torch_weights(fixture: fixtures.Fixture) -> dict[str, Any]:
    """Return a fixture's official state dict."""
    import torch

    return {name: torch.from_numpy(np.array(a)) for name, a in fixture.under("param/").items()}


def flax_tree(fixture: fixtures.Fixture) -> dict[str, Any]:
    """Return a fixture's official Flax tree."""
    tree: dict[str, Any] = {}
    for name, a in fixture.under("param/").items():
        *above, leaf = name.split("/")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[leaf] = a
    return tree


def in_torch(*entries: str, prefix: str = "", without: str = "$^") -> Callable:
    """Return a writer of a PyTorch file with the weights under the first entry and others under the rest, or bare."""

    def write(fixture, directory):
        import torch

        weights = {prefix + n: a for n, a in torch_weights(fixture).items() if not re.match(without, n)}
        tree = weights
        if entries:
            tree = {name: {n: a + i for n, a in weights.items()} for i, name in enumerate(entries)}
        torch.save(tree, directory / "weights.pth")
        return directory / "weights.pth"

    return write


def renamed(fixture: fixtures.Fixture, names: dict[str, str], without: str = "") -> dict[str, Any]:
    """Return a fixture's state dict without a prefix, its names changed by these regular expressions, in order."""
    weights = {name.removeprefix(without): a for name, a in torch_weights(fixture).items()}
    for pattern, replacement in names.items():
        weights = {re.sub(pattern, replacement, name): a for name, a in weights.items()}
    return weights


FASTGEN_NAMES = {
    r"^([tr]_embedder)\.mlp\.": r"\1.proj_net.", r"\.attn\.": ".attention.", r"\.mlp\.": ".feed_forward.",
    r"y_embedder\.embedding_table": "y_embedder.class_embeddings", r"final_layer\.linear": "final_layer.projection",
    r"final_layer\.adaLN_modulation": "final_layer.adaptive_params", r"\.adaLN_modulation\.": ".conditioning_net.",
}  # fmt: skip
DIFFUSERS_NAMES = {r"_flax_linear": "linear", r"_flax_embedding": "embedding"}
ENCODER_DEPTH = 2  # of the network of three blocks in REPA's legacy file


def of_fastgen(fixture: fixtures.Fixture, directory: pathlib.Path) -> pathlib.Path:
    """Write what FastGen's Checkpointer saves: the student, its EMAs, all with a log-variance, and the optimizer."""
    import torch

    weights = renamed(fixture, FASTGEN_NAMES)
    width = weights["x_embedder.proj.bias"]
    weights |= {"logvar_linear.weight": width[None], "logvar_linear.bias": width[:1]}
    offsets = {"net": 1, "ema_9999": 0, "ema_99995": 2}  # the first EMA is the recorded network
    nets = {net: {name: a + offset for name, a in weights.items()} for net, offset in offsets.items()}
    torch.save(
        {"model": nets, "optimizer": {"net": {"state": {0: {"exp_avg": width}}}}, "callbacks": {}, "iteration": 100},
        directory / "0000100.pth",
    )
    return directory / "0000100.pth"


def of_diffusers_imf(fixture: fixtures.Fixture, directory: pathlib.Path) -> pathlib.Path:
    """Write improved MeanFlow as a pipeline of diffusers has it."""
    import safetensors.torch

    folder = directory / "iMF-B-2" / "transformer"
    folder.mkdir(parents=True)
    (folder.parent / "model_index.json").write_text(json.dumps({"_class_name": ["pipeline", "IMFPipeline"]}))
    (folder / "config.json").write_text(json.dumps({"_class_name": "IMFTransformer2DModel"}))
    weights = renamed(fixture, DIFFUSERS_NAMES, without="net.")
    safetensors.torch.save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder.parent


def of_legacy_repa(fixture: fixtures.Fixture, directory: pathlib.Path) -> pathlib.Path:
    """Write the checkpoint of a network whose blocks are divided into those of an encoder and of a decoder."""
    import torch

    weights = renamed(fixture, {rf"^blocks\.{ENCODER_DEPTH}\.": "decoder_blocks.0."})
    torch.save({"ema": weights, "model": {n: a + 1 for n, a in weights.items()}}, directory / "last.pt")
    return directory / "last.pt"


def in_orbax(fixture: fixtures.Fixture, directory: pathlib.Path) -> pathlib.Path:
    """Write a train state with Orbax, and return the directory above it."""
    import orbax.checkpoint as ocp

    params = flax_tree(fixture)
    state = {"ema_params": params, "params": {"net": {name: a for name, a in params["net"].items()}}, "step": 10}
    ocp.PyTreeCheckpointer().save((directory / "release" / "checkpoint_10").absolute(), state)
    return directory / "release"


def in_msgpack(fixture: fixtures.Fixture, directory: pathlib.Path) -> pathlib.Path:
    """Write a train state as Flax does."""
    import flax.serialization

    (directory / "weights.msgpack").write_bytes(
        flax.serialization.msgpack_serialize({"ema_params": flax_tree(fixture)})
    )
    return directory / "weights.msgpack"


def sit_weights(fixture: fixtures.Fixture) -> dict[str, Any]:
    """Return the network as the original SiT has it, with a sigma."""
    import torch

    weights = {n: a for n, a in torch_weights(fixture).items() if not n.startswith("projectors.")}
    channels = weights["x_embedder.proj.weight"].shape[1]
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        pixels = weights[name].reshape(-1, channels, *weights[name].shape[1:])
        weights[name] = torch.cat([pixels, pixels + 1], dim=1).flatten(0, 1)
    return weights


def of_diffusers_sit(fixture: fixtures.Fixture, directory: pathlib.Path) -> pathlib.Path:
    """Write a pipeline of diffusers with the original SiT."""
    import safetensors.torch

    folder = directory / "SiT-XL-2-256" / "transformer"
    folder.mkdir(parents=True)
    (folder.parent / "model_index.json").write_text(json.dumps({"_class_name": ["pipeline", "SiTPipeline"]}))
    (folder / "config.json").write_text(json.dumps({"_class_name": "SiTTransformer2DModel"}))
    safetensors.torch.save_file(sit_weights(fixture), folder / "diffusion_pytorch_model.safetensors")
    return folder.parent


def of_sit(fixture: fixtures.Fixture, directory: pathlib.Path) -> pathlib.Path:
    """Write the checkpoint of the original SiT, with its own options beside the weights."""
    import torch

    weights = sit_weights(fixture)
    torch.save({"ema": weights, "args": {"path_type": "Linear", "prediction": "velocity"}}, directory / "sit.pt")
    return directory / "sit.pt"


def in_folder(fixture: fixtures.Fixture, directory: pathlib.Path) -> pathlib.Path:
    """Write two safetensors and their index into the transformer of a pipeline, as diffusers does."""
    import safetensors.torch

    folder = directory / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    (folder.parent / "model_index.json").write_text("{}")
    places: dict[str, str] = {}
    for i, half in enumerate((0, 1)):
        name = f"diffusion_pytorch_model-{i + 1:05}-of-00002.safetensors"
        part = dict(list(torch_weights(fixture).items())[half::2])
        safetensors.torch.save_file(part, folder / name)
        places |= dict.fromkeys(part, name)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder.parent


SMALL = {"num_heads": 4}
ROWS = (
    Row("zhuyu-cs/MeanFlow, DiT", ".pth of `ema` and `model`", "sit_torch", in_torch("ema", "model"), SMALL,
        back="zhuyu"),
    Row("the same", "a folder of diffusers, split", "sit_torch", in_folder, SMALL),
    Row("NVlabs/FastGen", ".pth of `net` and EMAs, its names", "sit_torch", of_fastgen, SMALL),
    Row("Gsunshine/meanflow", "directory above Orbax's `checkpoint_10`", "meanflow_dit_flax", in_orbax,
        SMALL | {"input_size": 8}),
    Row("the same", ".msgpack", "meanflow_dit_flax", in_msgpack, SMALL | {"input_size": 8}, back="meanflow-jax"),
    Row("Gsunshine/py-meanflow", ".pth with `net_ema` and `net_ema1`", "meanflow_unet_torch",
        in_torch("net_ema", "net_ema1", "net"), output="u_noaug", back="py-meanflow"),
    Row("zhuyu-cs/MeanFlow, branch cifar10", ".pth of `ema`", "sit_cifar_unet_torch", in_torch("ema"),
        {"qkv_layout": "interleaved"}, back="zhuyu"),
    Row("Lyy-iiis/imeanflow, PyTorch", ".pth of `net.`", "imf_dit_torch", in_torch(), {"input_size": 8}, back="imf"),
    Row("iMF-diffusers", "a folder of diffusers, its names", "imf_dit_torch", of_diffusers_imf, {"input_size": 8}),
    Row("Lyy-iiis/imeanflow, JAX", "directory above Orbax's `checkpoint_10`", "imf_dit_flax", in_orbax,
        {"input_size": 8}, back="imf-jax"),
    Row("kyungmnlee/dmf", ".pt, bare", "dmf_dmft_torch", in_torch(), SMALL | {"dmf_depth": 2}, back="dmf"),
    Row("sihyun-yu/REPA", ".pt of `ema` and `model`", "dmf_sit_torch", in_torch("ema", "model"), SMALL, "v", "dmf"),
    Row("the same, `--legacy`", ".pt of `decoder_blocks`", "dmf_sit_torch", of_legacy_repa, SMALL, "v"),
    Row("willisma/SiT", ".pt, time reversed, a sigma", "dmf_sit_torch", of_sit, SMALL, "reversed"),
    Row("SiT-diffusers", "a folder of diffusers, time reversed", "dmf_sit_torch", of_diffusers_sit, SMALL, "reversed"),
    Row("Re-MeanFlow", ".pt of EDM2's network, two times", "remeanflow_edm2_torch", in_torch("ema"),
        {"head_width": 12}),
)  # fmt: skip


def inputs(row: Row, fixture: fixtures.Fixture) -> tuple[tuple, dict[str, np.ndarray], np.ndarray]:
    """Return (z, t, r, labels), the other conditions, and the recorded output [b h w c]."""
    given = {name.removeprefix("in/fwd/"): fixture.get(name) for name in fixture.arrays if name.startswith("in/fwd/")}
    z, t = nhwc(given["x"]) if row.fixture.endswith("torch") else given["x"], given["t"]
    r = given["r"] if "r" in given else t - given.get("h", 0)
    expected = fixture.get(f"out/fwd/{'v' if row.output == 'reversed' else row.output}")
    expected = nhwc(expected) if row.fixture.endswith("torch") else expected
    if row.output == "reversed":
        t, expected = (1 - t.astype(np.float64)).astype(np.float32), -expected
    told = {name: given[name] for name in ("omega", "t_min", "t_max") if name in given}
    return (z, t, r, given.get("y", 0)), told, expected


def measure(row: Row, directory: pathlib.Path) -> dict[str, float | str]:
    """Return the relative error of each framework, and whether the file is written back, for one row."""
    import jax_impl
    import torch_impl

    fixture = fixtures.Fixture(check.GOLDEN / f"{row.fixture}.npz")
    path = row.write(fixture, directory)
    arguments, told, expected = inputs(row, fixture)
    found: dict[str, float | str] = {}
    for name, package in (("jax", jax_impl), ("torch", torch_impl)):
        u = package.load(path, **row.options).velocity(*arguments, **told)
        found[name] = float(np.linalg.norm(u - expected) / np.linalg.norm(expected))
    if row.back:
        found["back"] = f"`--for {row.back}`" if is_written_back(row, path, directory) else "differs"
    return found


def is_written_back(row: Row, path: pathlib.Path, directory: pathlib.Path) -> bool:
    """Return whether the file that `--for` writes from canonical weights gives the same canonical weights."""
    from meanflow.weights import files, reading

    first, written = directory / "first.safetensors", directory / f"back{'.msgpack' if 'jax' in row.back else '.pth'}"
    model = __import__("torch_impl").load(path, **row.options)
    config = convert.with_latents(model.config, None)
    convert.convert(path, first, convert.Options(config=config))
    convert.convert(first, written, convert.Options(config=config, layout=row.back))
    one, other = files.load(first), reading.read(written).weights
    names = {name for name in one if not name.startswith(("v_heads.", "v_final_layer.")) and name != "pos_embed"}
    return names <= other.keys() and all(np.array_equal(one[name], other[name]) for name in names)


def full_rows() -> Iterator[str]:
    """Yield rows for a file of SiT-XL/2 as it is published: seconds and memory of reading and one step."""
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name) / "SiT-XL-2-256.pt"
        weights = subprocess.run(
            [sys.executable, "-c", WRITE_XL, str(path)], check=True, capture_output=True, text=True
        ).stdout.strip()
        for what, code in (
            ("`jax_impl.load`", READ_XL.format(framework="jax")),
            ("`torch_impl.load`", READ_XL.format(framework="torch")),
            ("`parity/convert.py`, to .safetensors", CONVERT_XL),
        ):  # fmt: skip
            began = time.monotonic()
            done = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
            loaded, peak = done.stdout.splitlines()[-1].split()
            yield (f"| {what} | {float(weights):.2f} | {float(loaded):.1f} | {time.monotonic() - began:.0f} | "
                   f"{float(peak):.2f} |")  # fmt: skip


WRITE_XL = """
import sys, torch
from meanflow.config import options
from meanflow.config.networks import DIT_SIZES
from torch_impl.step import build_net
config = options.get_config("dit", "flow")
config.model.update(DIT_SIZES["XL"], input_size=32, patch_size=2, channels=4, num_classes=1000)
net = build_net(config)
state = {n: torch.randn(p.shape) * 0.02 for n, p in net.named_parameters()}
state |= {n: torch.cat([state[n], state[n]]) for n in ("final_layer.linear.weight", "final_layer.linear.bias")}
state |= {n: torch.from_numpy(a) for n, a in net.tables().items()}
print(sum(a.nbytes for a in state.values()) / 2**30)
torch.save(state, sys.argv[1])
"""
READ_XL = """
import resource, sys, time
import {framework}_impl
began = time.monotonic()
model = {framework}_impl.load(sys.argv[1])
loaded = time.monotonic() - began
model.sample(1, steps=1, decode=False)
print(loaded, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
CONVERT_XL = """
import resource, sys, time
from parity import convert
began = time.monotonic()
convert.main([sys.argv[1], sys.argv[1] + ".safetensors"])
print(time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def page(full: bool) -> tuple[str, bool]:
    """Return the page, and whether all errors are within the bound."""
    columns = "| source | file | JAX: error | PyTorch: error | writes back |"
    lines = [HEAD.format(full=" --full" if full else ""), columns, "| --- | --- | --- | --- | --- |"]
    ok = True
    for row in ROWS:
        with tempfile.TemporaryDirectory() as name:
            found = measure(row, pathlib.Path(name))
        errors = [float(found[framework]) for framework in ("jax", "torch")]
        ok &= max(errors) <= BOUND and found.get("back") != "differs"
        lines.append(f"| {row.source} | {row.file} | {errors[0]:.1e} | {errors[1]:.1e} | {found.get('back', '–')} |")
        print(lines[-1], file=sys.stderr, flush=True)
    if full:
        lines += ["", "A file of SiT-XL/2 as it is published (675 million parameters, float32), loaded and sampled in "
                  "one step, and converted, on two cores.  The peak includes 0.4 GiB of imports, and the network where "
                  "there is one:", "", "| command | weights, GiB | s to load or convert | s in all | peak GiB |",
                  "| --- | --- | --- | --- | --- |", *full_rows()]  # fmt: skip
    return "\n".join([*lines, ""]), ok


def main(argv: list[str] | None = None) -> int:
    """Write the page, and return the exit code: 1 if an output differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="measure a file of SiT-XL/2, too (8 GiB, minutes)")
    parser.add_argument("--output", type=pathlib.Path, default=PAGE, help="(default: docs/weights.md)")
    args = parser.parse_args(argv)
    text, ok = page(args.full)
    args.output.write_text(text)
    return 0 if ok else 1


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
