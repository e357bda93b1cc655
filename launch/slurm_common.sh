#!/usr/bin/env bash
# Sourced by slurm_jax.sh and slurm_torch.sh: reads their arguments, and runs a job step that may be stopped.
# USR1 (--signal: the time limit is near) saves and requeues the job.  TERM (scontrol requeue, preemption, scancel)
# saves; SLURM itself requeues or cancels, and kills what still runs after KillWait or the partition's GraceTime.
set -euo pipefail
config=${1:?config file, e.g. configs/digits.py} workdir=${2:?work directory}
arguments=(--config="$config" --workdir="$workdir" "${@:3}")
cpus=${SLURM_CPUS_PER_TASK:-1} tasks=${SLURM_NTASKS_PER_NODE:-1}

train() { # COMMAND...: runs it and exits with its code
    local code=0 stopped= pid
    "$@" &
    pid=$!
    trap 'stopped=1; kill -USR1 "$pid"' USR1 # srun passes it on to the processes
    trap : TERM                              # SLURM sends it to the processes, too
    wait "$pid" || code=$?
    while kill -0 "$pid" 2>/dev/null; do # the signal interrupted wait, not the run
        code=0
        wait "$pid" || code=$?
    done
    if [ -n "$stopped" ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}
