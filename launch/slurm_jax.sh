#!/usr/bin/env bash
# Train in JAX on the GPUs of several nodes under SLURM, from the root of this checkout:
#   sbatch --nodes=2 --time=24:00:00 launch/slurm_jax.sh configs/meanflow_imagenet.py:b4 runs/b4 [overrides]
# One task per GPU.  Five minutes before the time limit the run saves, and the job is requeued to continue.
#SBATCH --job-name=meanflow
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
cd "${SLURM_SUBMIT_DIR:?start this script by sbatch}" && . launch/slurm_common.sh
train srun --gpu-bind=none --cpus-per-task="$cpus" .venv/bin/python -m jax_impl.main --distributed "${arguments[@]}"
