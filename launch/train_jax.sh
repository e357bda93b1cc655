#!/usr/bin/env bash
# Train in JAX on all devices of this node:  launch/train_jax.sh configs/meanflow_imagenet.py:b4 runs/b4 [overrides]
set -euo pipefail
cd "$(dirname "$0")/.."
config=${1:?config file, e.g. configs/digits.py} workdir=${2:?work directory}
exec .venv/bin/python -m jax_impl.main --config="$config" --workdir="$workdir" "${@:3}"
