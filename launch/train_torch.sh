#!/usr/bin/env bash
# Train in PyTorch, a process for each GPU of this node (one without):
#   launch/train_torch.sh configs/meanflow_imagenet.py:b4 runs/b4_torch [overrides]
set -euo pipefail
cd "$(dirname "$0")/.."
config=${1:?config file, e.g. configs/digits.py} workdir=${2:?work directory}
# What torchrun does with signals: pass on SIGUSR1 of SLURM too, and wait for a checkpoint.  Older ones ignore this.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
gpus=$(.venv/bin/python -c "import torch; print(max(1, torch.cuda.device_count()))")
exec .venv/bin/torchrun --standalone --nproc_per_node="$gpus" torch_impl/train.py \
    --config="$config" --workdir="$workdir" "${@:3}"
