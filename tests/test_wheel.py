"""What is installed: the four packages, whole, and no name that belongs to others."""

import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("meanflow", "jax_impl", "torch_impl", "parity")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the checkout, since a build leaves files in it, with links in place of its folders."""
    path = tmp_path_factory.mktemp("tree")
    for name in ("setup.py", "pyproject.toml"):
        (path / name).write_bytes((ROOT / name).read_bytes())
    for folder in ROOT.iterdir():
        if folder.is_dir() and not folder.name.startswith(".") and folder.name != "build":
            (path / folder.name).symlink_to(folder)
    return path


def test_wheel_holds_the_packages_whole_and_nothing_else(tree, tmp_path):
    subprocess.run([sys.executable, "-c", BUILD, tmp_path], cwd=tree, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = [file for name in PACKAGES for suffix in ("py", "npz") for file in (ROOT / name).rglob(f"*.{suffix}")]
    assert names == {str(file.relative_to(ROOT)) for file in wanted} >= {"parity/golden/sit_torch.npz"}


def test_editable_install_sees_the_checkout(tree, tmp_path):
    """Else benchmarks/ and configs/, which are not installed, could not import what is beside them."""
    build = BUILD.replace("build_wheel", "build_editable")
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=tree, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [path] = [archive.read(name).decode() for name in archive.namelist() if name.endswith(".pth")]
    assert pathlib.Path(path.strip()) == tree
