#!/usr/bin/env bash
# Train on the GPUs of several nodes under SLURM, from the root of this checkout:
#   sbatch --nodes=2 --time=24:00:00 launch/slurm.sh jax configs/meanflow_imagenet.py:b4 runs/b4 [overrides]
#   sbatch --nodes=4 --gpus-per-node=4 --ntasks-per-node=4 launch/slurm.sh torch CONFIG WORKDIR [overrides]
# Request one task per GPU.  Five minutes before the time limit the run saves, and the job is requeued to continue.
#SBATCH --job-name=meanflow
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
framework=${1:?jax or torch} config=${2:?config file, e.g. configs/digits.py} workdir=${3:?work directory}
cd "${SLURM_SUBMIT_DIR:?start this script by sbatch}"
arguments=(--config="$config" --workdir="$workdir" "${@:4}")
cpus=${SLURM_CPUS_PER_TASK:-1}

case $framework in
jax) # one process per GPU
    step=(srun --gpu-bind=none --cpus-per-task="$cpus" .venv/bin/python -m jax_impl.main --distributed) ;;
torch) # torchrun on each node, which passes on signals and gives its processes time to save
    read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 PET_SHUTDOWN_TIMEOUT=270
    step=(srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --gpu-bind=none
        --cpus-per-task=$((cpus * ${SLURM_NTASKS_PER_NODE:-1}))
        .venv/bin/torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=gpu --rdzv_backend=c10d
        --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$first:$((20000 + SLURM_JOB_ID % 20000))" torch_impl/train.py) ;;
*)
    echo "error: the first argument is $framework; it must be jax or torch" >&2
    exit 2 ;;
esac

stopped=
"${step[@]}" "${arguments[@]}" &
pid=$!
trap 'stopped=1; kill -USR1 "$pid"' USR1 # srun passes it on to the processes
code=0
wait "$pid" || code=$?
while kill -0 "$pid" 2>/dev/null; do # the signal interrupted wait, not the run
    code=0
    wait "$pid" || code=$?
done
if [ -n "$stopped" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
