"""The notebook in examples/: it runs in both frameworks, and its committed outputs are complete and small."""

import json
import os
import pathlib
import re

import nbclient
import nbformat
import pytest
import tiny as tiny_configs
from saved import write_run

from parity.cases import objectives
from torch_impl.step import build_net

PATH = pathlib.Path(__file__).parents[1] / "examples" / "sample.ipynb"
LARGEST = 300_000  # bytes
APART = 1e-4  # of the frameworks


def execute(monkeypatch, datasets_dir, **parameters):
    """Return the text that the notebook prints; a cell that fails raises CellExecutionError."""
    monkeypatch.setenv("TFDS_DATA_DIR", datasets_dir)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PATH.parents[1]), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(PATH, 4)
    [chosen] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    chosen.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    return "".join(output["text"] for output in outputs if output.output_type == "stream" and output.name == "stdout")


def differences(text):
    """Return the largest differences of the frameworks that the notebook prints, in u and in samples."""
    return [float(number) for number in re.findall(r"(\S+e-\d+) in", text)]


@pytest.mark.slow
def test_it_trains_and_samples_in_pytorch(datasets_dir, monkeypatch):
    text = execute(monkeypatch, datasets_dir, framework="torch", train_steps=4)
    assert "canonical safetensors" in text and "(30, 8, 8, 1) uint8" in text
    assert "difference of torch and jax" in text
    assert len(differences(text)) == 2 and max(differences(text)) < APART


@pytest.mark.slow
def test_it_samples_a_run_in_jax(datasets_dir, tmp_path, monkeypatch):
    """The run has random weights, which all matter, unlike those of a network that has hardly been trained."""
    config = tiny_configs.make("imf_dit", "improved")
    weights, tables = objectives.random_weights(config), build_net(config).tables()
    weights = {name: (a if name in tables else 3 * a).astype("float32") for name, a in weights.items()}
    write_run("jax", tmp_path / "run", config, weights)
    text = execute(monkeypatch, datasets_dir, framework="jax", source=str(tmp_path / "run"))
    assert "canonical safetensors" in text and "difference of jax and torch" in text
    assert len(differences(text)) == 2 and 0 < max(differences(text)) < APART


def test_its_outputs_are_committed():
    """Every cell was run once, in order, without an error; nothing names a directory of the machine."""
    text = PATH.read_text()
    assert len(text.encode()) < LARGEST
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    printed = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
    assert len(differences(printed)) == 2 and max(differences(printed)) < APART
    assert not re.search(r"/(home|root|tmp|work|Users)/", printed)
