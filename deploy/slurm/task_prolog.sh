#!/usr/bin/env bash
# For slurm.conf: TaskProlog=/etc/slurm/sidestep-task-prolog.sh. What it prints becomes the environment of each task.
#
# On nodes with a daemon of their own (deploy/systemd, the instance `train`) jobs on one node log through it without a
# word in their scripts, unless they have said where to: `sidestep run`, or an address of theirs.

SOCKET=/run/sidestep/train/daemon.sock

if [[ -z ${SIDESTEP_ADDRESS:-} && ${SLURM_JOB_NUM_NODES:-1} -eq 1 && -w $SOCKET ]]; then
    echo "export SIDESTEP_ADDRESS=ipc://$SOCKET"
    echo "export SIDESTEP_RUN_ID=${SIDESTEP_RUN_ID:-slurm-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
fi
