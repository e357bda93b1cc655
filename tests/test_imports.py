"""Imports point one way, and there is no circle among the files of the project."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# What each package may import besides itself.  The files directly in meanflow/ are a package of their own.
ALLOWED = {
    "meanflow": (),
    "meanflow.config": ("meanflow",),
    "meanflow.weights": ("meanflow", "meanflow.config"),
    "meanflow.sampling": ("meanflow", "meanflow.config"),
    "meanflow.data": ("meanflow", "meanflow.config", "meanflow.weights", "meanflow.sampling"),
    "meanflow.metrics": ("meanflow", "meanflow.config", "meanflow.weights", "meanflow.data"),
    "meanflow.commands": (
        "meanflow", "meanflow.config", "meanflow.weights", "meanflow.sampling", "meanflow.data", "meanflow.metrics",
    ),
    "configs": ("meanflow.config",),
    "jax_impl": ("meanflow.",),
    "torch_impl": ("meanflow.",),
    "parity": ("meanflow.", "jax_impl", "torch_impl"),
    "benchmarks": ("meanflow.", "jax_impl", "torch_impl", "configs", "parity"),
}  # fmt: skip
NOT_TO_COMPUTE_WITH = {"tensorflow", "tensorflow_datasets", "clu", "diffusers"}
FRAMEWORKS = {"jax", "jaxlib", "flax", "optax", "orbax", "torch", "torchvision", "transformers"}
READERS_OF_TFDS = {"meanflow.data.images.digits", "meanflow.data.images.tfds_images"}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in {name.split(".")[0] for name in ALLOWED}
    for path in (ROOT / package).rglob("*.py")
}


def package_of(module):
    parts = module.split(".")
    inner = parts[0] == "meanflow" and len(parts) > 1 and (ROOT / "meanflow" / parts[1]).is_dir()
    return ".".join(parts[:2]) if inner else parts[0]


def at_start(node):
    """Yield the nodes that run when a module is imported: those outside functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from at_start(child)


def imports(module, walk=ast.walk):
    """Return the modules that a file imports, wherever in it; those of the project by their full names."""
    found = set()
    for node in walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & FILES.keys()) | ({node.module} if names - FILES.keys() else set())
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package):
    wrong = [
        (module, other)
        for module in FILES
        if package_of(module) == package
        for other in imports(module) & FILES.keys()
        if package_of(other) != package
        and not any(package_of(other) == one or (one[-1] == "." and other.startswith(one)) for one in ALLOWED[package])
    ]
    assert not wrong


def test_no_import_circle():
    graph = {module: imports(module) & FILES.keys() - {module} for module in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the modules of the circle


def test_what_the_frameworks_share_needs_neither():
    """A function may import one, where only that one has what it needs.  Of TFDS, only what reads its datasets."""
    found = {module: {name.split(".")[0] for name in imports(module, at_start)} for module in FILES}
    shared = {module: names for module, names in found.items() if module.split(".")[0] in ("meanflow", "configs")}
    assert not {module: names & FRAMEWORKS for module, names in shared.items() if names & FRAMEWORKS}
    assert {module for module, names in shared.items() if names & NOT_TO_COMPUTE_WITH} == READERS_OF_TFDS


@pytest.mark.parametrize("package", ["jax_impl", "torch_impl"])
def test_what_computes_imports_no_tensorflow(package):
    for module in FILES:
        if module == f"{package}.step" or module.startswith((f"{package}.models.", f"{package}.methods.")):
            assert not {name.split(".")[0] for name in imports(module)} & NOT_TO_COMPUTE_WITH, module


def test_the_pytorch_trainer_loads_triton_before_tensorflow():
    """Triton 3.7, which `torch.utils.flop_counter` loads, crashes otherwise; writers of metrics load TensorFlow."""
    script = (
        "import sys, torch_impl.train; assert 'torch.utils.flop_counter' in sys.modules; "
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
