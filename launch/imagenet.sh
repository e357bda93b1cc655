#!/usr/bin/env bash
# MeanFlow on ImageNet in PyTorch, from a folder of images to FID, with one process per GPU of this node:
#   launch/imagenet.sh IMAGENET INCEPTION DIR [CONFIG]
# IMAGENET has one folder per class; INCEPTION is the .pth that torch-fidelity or pytorch-fid downloads.
# If it is killed, rerun it: finished parts are not repeated.
set -euo pipefail
images=$(realpath "${1:?folder of images}") inception=$(realpath "${2:?weights of Inception, .pth}")
dir=$(realpath -m "${3:?directory for everything}") config=${4:-configs/meanflow_imagenet.py:b4}
cd "$(dirname "$0")/.."
# Makes torchrun pass on SIGUSR1, which SLURM sends, and wait for a checkpoint.  Older versions ignore this.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
gpus=$(.venv/bin/python -c "import torch; print(max(1, torch.cuda.device_count()))")
run=(.venv/bin/torchrun --standalone --nproc_per_node="$gpus")
mkdir -p "$dir"

echo "== 1/4 latents"
"${run[@]}" torch_impl/encode.py --source="$images" --dest="$dir/latents"
echo "== 2/4 training"
"${run[@]}" torch_impl/train.py --config="$config" --config.data.name="$dir/latents" --workdir="$dir/run"
echo "== 3/4 statistics of the real images"
[ -f "$dir/inception.safetensors" ] || .venv/bin/python parity/convert.py "$inception" "$dir/inception.safetensors"
[ -f "$dir/real.npz" ] || "${run[@]}" torch_impl/evaluate.py --make_reference="$images" --image_size=256 \
    --metrics=fid --reference="$dir/real.npz" --inception="$dir/inception.safetensors"
echo "== 4/4 FID and Inception Score of 50 000 samples"
"${run[@]}" torch_impl/evaluate.py --workdir="$dir/run" --metrics=fid,is --num_samples=50000 \
    --reference="$dir/real.npz" --inception="$dir/inception.safetensors"
