# Two commands: `make demo` trains, converts, samples and compares; `make test` runs the tests.  Both set up first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
# An index with the CPU build of PyTorch, where PyPI would give the CUDA one.
TORCH_INDEX ?=
# Idle OpenMP threads sleep instead of spinning, which matters as soon as two programs share the cores.
export OMP_WAIT_POLICY ?= passive

.PHONY: install demo test test-all lint parity benchmark gpu slurm-test clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --target $(VENV)/rehearse \
		jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12
	touch $@

demo: install
	launch/demo.sh $(DEMO)

test: install
	$(BIN)/python -m pytest

# Those marked slow, too.
test-all: install
	$(BIN)/python -m pytest -m ""

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Every check of parity: float64, lower precisions and the outputs of the official code.
parity: install
	$(BIN)/python parity/check.py

benchmark: install
	for framework in jax torch; do for command in step sample scaling; do \
		$(BIN)/python benchmarks/$$command.py --framework=$$framework || exit 1; \
	done; done

# On a machine with a GPU: what works, and how fast; nine minutes at most.
gpu: install
	$(BIN)/python benchmarks/gpu.py

# The launch scripts of launch/ on a SLURM of this machine, if it has the packages slurmctld and slurmd.
slurm-test: install
	$(BIN)/python -m pytest -m "" tests/test_slurm.py

clean:
	rm -rf $(VENV) runs build *.egg-info
