"""Imports point one way, and there is no circle among the files of the project."""

import ast
import graphlib
import pathlib

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
FRAMEWORKS = {"flax", "jax", "optax", "orbax", "torch"}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in {name.split(".")[0] for name in ALLOWED}
    for path in (ROOT / package).rglob("*.py")
}


def package_of(module):
    parts = module.split(".")
    inner = parts[0] == "meanflow" and len(parts) > 1 and (ROOT / "meanflow" / parts[1]).is_dir()
    return ".".join(parts[:2]) if inner else parts[0]


def imports(module):
    """Return the modules that a file imports, wherever in it; those of the project by their full names."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
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


@pytest.mark.parametrize("package", ["jax_impl", "torch_impl"])
def test_what_computes_imports_no_tensorflow(package):
    for module in FILES:
        if module == f"{package}.step" or module.startswith((f"{package}.models.", f"{package}.methods.")):
            assert not {name.split(".")[0] for name in imports(module)} & NOT_TO_COMPUTE_WITH, module


def test_what_both_share_imports_no_framework_by_itself():
    """A function may, where a format needs it."""
    for module, path in FILES.items():
        if module.split(".")[0] in ("meanflow", "configs"):
            nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
            names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
            assert not {name.split(".")[0] for name in names} & FRAMEWORKS, module
