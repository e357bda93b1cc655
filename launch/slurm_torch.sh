#!/usr/bin/env bash
# Train in PyTorch on the GPUs of several nodes under SLURM, from the root of this checkout:
#   sbatch --nodes=4 --gpus-per-node=4 --ntasks-per-node=4 launch/slurm_torch.sh CONFIG WORKDIR [overrides]
# Request one task per GPU; one torchrun per node starts them.  Five minutes before the time limit the run saves, and the
# job is requeued to continue.
#SBATCH --job-name=meanflow
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
cd "${SLURM_SUBMIT_DIR:?start this script by sbatch}" && . launch/slurm_common.sh
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Makes torchrun pass on SIGUSR1, and wait for a checkpoint: as long as SLURM does.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 PET_SHUTDOWN_TIMEOUT=270
train srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --gpu-bind=none --cpus-per-task=$((cpus * tasks)) \
    .venv/bin/torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$tasks" --rdzv_backend=c10d \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$first:$((20000 + SLURM_JOB_ID % 20000))" \
    torch_impl/train.py "${arguments[@]}"
