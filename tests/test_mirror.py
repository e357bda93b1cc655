"""The twins have the same files, public names in the same order, and arguments."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Files without a twin, and why.
ALONE = {
    "main.py": "PyTorch's entry is train.py, as torchrun expects",
    "models/flash.py": "the package jvp_flash_attention is for PyTorch alone",
}
# Public names without a twin, and why.
ONE_SIDED = {
    "models/layers.py": {
        "matmul": "PyTorch's linear layers are one product already",
        "convolve": "PyTorch has conv2d",
        "gelu": "it is another form for inductor, whose tanh was seen to cost more",
    },
    "models/tape.py": {
        "remembered": "PyTorch makes dual numbers by hand",
        "in_turn": "autograd runs blocks in order, and DDP reduces each bucket as soon as it is full",
        "gather_outside_blocks": "FSDP2 gathers",
        "keeps": "PyTorch takes a list",
    },
    "models/attention.py": {
        "has_kernel": "PyTorch asks itself which kernel it can use",
    },
    "models/pixels.py": {"MASK32": "JAX has unsigned integers"},
    "devices.py": {
        "define_flags": "torchrun says in the environment what JAX needs flags for",
        "with_float64": "PyTorch needs no switch for float64",
        "start_jax": "JAX chooses its devices itself",
        "choose_device": "the same",
        "start_torch": "the same",
        "AXES": "PyTorch has one device a process",
        "local_mesh": "the same",
        "device_mesh": "the same",
        "order_devices": "the same",
        "compiled_for": "PyTorch runs where its tensors are",
        "platform": "the same",
        "shard": "FSDP2 shards and gathers",
        "in_parts": "the same",
        "sharded": "the same",
        "gathered": "the same",
        "TIMEOUT": "JAX has its own",
        "PIECE": "PyTorch gathers objects of any size",
    },
    "step.py": {
        "BATCH": "sharding is an annotation in JAX",
        "KEEP_BARRIERS": "an option of XLA",
        "state_shardings": "the same",
        "abstract_net": "PyTorch has its meta device, or draws in no time",
        "abstract_state": "PyTorch restores into the tensors that are there",
        "replace_params": "JAX makes the state of the parameters it is to have",
        "copy_whole": "the same",
        "is_fixed": "PyTorch knows what needs no gradient",
        "Loss": "DDP and FSDP wrap a module",
        "Sharded": "the same",
        "wrap": "the same",
        "synchronised": "JAX reduces gradients itself",
        "reduce_metrics": "the same",
        "copy_beside": "JAX copies on a stream of its own",
    },
    "sample.py": {"sampler_of": "JAX's sampler takes the weights of each call, so one serves a network, too"},
    "weights.py": {
        "LEAVES": "PyTorch's names are the canonical ones",
        "canonical_name": "the same",
        "to_torch": "the same",
        "to_flax": "the same",
    },
    "train.py": {"main": "JAX's entry is main.py", "fetch": "PyTorch's, reduce_metrics, is in step.py"},
}
# Same-named functions whose arguments differ: JAX passes state and mesh, PyTorch modules and devices.
OTHER_ARGUMENTS = {"train.py", "step.py", "portable.py", "models/edm2.py", "sample.py", "evaluate.py", "models/dit.py",
                   "models/layers.py", "models/attention.py"}  # fmt: skip


def files(package):
    return {str(path.relative_to(ROOT / package)) for path in (ROOT / package).rglob("*.py")}


def public(path):
    """Return {name: argument names, or None} of a file's public functions, classes and constants, in order."""
    names = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names[node.name] = [a.arg for a in [*node.args.args, *node.args.kwonlyargs]]
        elif isinstance(node, ast.ClassDef):
            names[node.name] = None
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = None
    return {name: arguments for name, arguments in names.items() if not name.startswith("_")}


TWINS = sorted((files("jax_impl") & files("torch_impl")) - {"__init__.py"})


def test_the_same_files():
    assert (files("jax_impl") ^ files("torch_impl")) == set(ALONE)


@pytest.mark.parametrize("file", TWINS)
def test_the_same_public_names_in_the_same_order(file):
    expected = ONE_SIDED.get(file, {})
    jax, torch = (list(public(ROOT / package / file)) for package in ("jax_impl", "torch_impl"))
    assert set(jax) ^ set(torch) == set(expected)
    assert [n for n in jax if n not in expected] == [n for n in torch if n not in expected]


@pytest.mark.parametrize("file", [file for file in TWINS if file not in OTHER_ARGUMENTS])
def test_the_same_arguments(file):
    jax, torch = (public(ROOT / package / file) for package in ("jax_impl", "torch_impl"))
    for name in jax.keys() & torch.keys():
        if jax[name] is not None:  # a class, or in JAX a constant that is called, such as an initialiser
            assert jax[name] == torch[name], name
