#!/usr/bin/env bash
# Train in PyTorch with one process per GPU of this node (one process if there is none):
#   launch/train_torch.sh configs/meanflow_imagenet.py:b4 runs/b4_torch [overrides]
set -euo pipefail
cd "$(dirname "$0")/.."
config=${1:?config file, e.g. configs/digits.py} workdir=${2:?work directory}
# Makes torchrun pass on SIGUSR1, which SLURM sends, and wait for a checkpoint.  Older versions ignore this.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
gpus=$(.venv/bin/python -c "import torch; print(max(1, torch.cuda.device_count()))")
exec .venv/bin/torchrun --standalone --nproc_per_node="$gpus" torch_impl/train.py \
    --config="$config" --workdir="$workdir" "${@:3}"
