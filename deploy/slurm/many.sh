#!/usr/bin/env bash
# A training on many nodes, as one run through all of its restarts.
#
#   sbatch --nodes=4 deploy/slurm/many.sh torchrun --nproc-per-node=gpu train.py
#
# - one `sidestep run` on each node: the first node's has the daemon with the run, the others have relays of it. They
#   find each other in the directory that the job was submitted from, which all nodes share, and make keys for the job
# - torchrun takes how many nodes there are and where they meet from PET_NNODES and so on; other launchers have
#   MASTER_ADDR and MASTER_PORT
# - signals, the end of its time, requeueing and what is left of a killed daemon: as in single.sh
#
#SBATCH --job-name=training
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
##SBATCH --gpus-per-node=8
##SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180

set -euo pipefail

EXIT_REQUEUE=85
export SIDESTEP_RUN_ID=${SIDESTEP_RUN_ID:-slurm-$SLURM_JOB_ID}
export SIDESTEP_DIR=${SIDESTEP_DIR:-$SLURM_SUBMIT_DIR}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=${MASTER_PORT:-29500}
export MASTER_ADDR MASTER_PORT
export PET_NNODES=$SLURM_JOB_NUM_NODES PET_RDZV_BACKEND=c10d PET_RDZV_ENDPOINT=$MASTER_ADDR:$MASTER_PORT PET_RDZV_ID=$SLURM_JOB_ID

# What the start before this one left, if anything. Not the run's end: the same id goes on below.
for run_dir in "$SIDESTEP_DIR"/sidestep-runs/*-"$SIDESTEP_RUN_ID"; do
    if [[ -d $run_dir ]]; then
        sidestep drain "$run_dir" || true
    fi
done

# A signal to the tasks, and not to srun, which would end them at once.
time_is_over='' told_to_end=''
srun --kill-on-bad-exit=0 sidestep run -- "$@" &
tasks=$!
trap 'time_is_over=yes; scancel --signal=TERM "$SLURM_JOB_ID" || true' USR1
trap 'told_to_end=yes' TERM

code=0
wait "$tasks" || code=$?
while kill -0 "$tasks" 2>/dev/null; do
    code=0
    wait "$tasks" || code=$?
done

if [[ -z $told_to_end && ( $code -eq $EXIT_REQUEUE || ( -n $time_is_over && $code -ne 0 ) ) ]]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
