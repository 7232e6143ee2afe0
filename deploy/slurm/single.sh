#!/usr/bin/env bash
# A training on one node, as one run through all of its restarts.
#
#   sbatch deploy/slurm/single.sh torchrun --standalone --nproc-per-node=gpu train.py
#
# - three minutes before its time is over the training is sent SIGTERM: it saves a checkpoint and ends; the daemon then
#   writes what is left, and ends too. The job is queued again, and goes on in the same run
# - the same when the training asks for it by ending with 85, at any time
# - preempted or requeued by others, it has KillWait seconds for that; cancelled it stays cancelled
# - a daemon that was killed before it was done has lost nothing that was acknowledged: the next start finishes it first
#
#SBATCH --job-name=training
#SBATCH --nodes=1
#SBATCH --ntasks=1
##SBATCH --gpus-per-node=8
##SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180

set -euo pipefail

EXIT_REQUEUE=85
export SIDESTEP_RUN_ID=${SIDESTEP_RUN_ID:-slurm-$SLURM_JOB_ID}
export SIDESTEP_DIR=${SIDESTEP_DIR:-$SLURM_SUBMIT_DIR}

# What the start before this one left, if anything. Not the run's end: the same id goes on below.
for run_dir in "$SIDESTEP_DIR"/sidestep-runs/*-"$SIDESTEP_RUN_ID"; do
    if [[ -d $run_dir ]]; then
        sidestep drain "$run_dir" || true
    fi
done

# In the background, so that this shell hears its signals; `wait` returns at each, and says 128 + its number.
time_is_over='' told_to_end=''
sidestep run -- "$@" &
daemon=$!
trap 'time_is_over=yes; kill -TERM "$daemon" 2>/dev/null || true' USR1
trap 'told_to_end=yes; kill -TERM "$daemon" 2>/dev/null || true' TERM

code=0
wait "$daemon" || code=$?
while kill -0 "$daemon" 2>/dev/null; do
    code=0
    wait "$daemon" || code=$?
done

if [[ -z $told_to_end && ( $code -eq $EXIT_REQUEUE || ( -n $time_is_over && $code -ne 0 ) ) ]]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
