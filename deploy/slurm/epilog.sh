#!/usr/bin/env bash
# For slurm.conf: Epilog=/etc/slurm/sidestep-epilog.sh. Runs as root on each node of a job when it ends there.
#
# What a killed daemon left on this node's own disk can be finished on this node alone, and what workers kept when they
# found no daemon is in this node's temporary directory. Both are taken care of in the name of the job's user, for as
# long as PATIENCE_S allows; what is not done then is where it was, and `sidestep drain` goes on with it.
# A run that is finished takes no more, so relays on other nodes, which KillWait leaves alive for longer, end first.
# It never fails: a node is not drained because of logging.

set -uo pipefail
export PATH=/usr/sbin:/usr/bin:/sbin:/bin  # SLURM gives it none

PATIENCE_S=${PATIENCE_S:-240}
RELAYS_S=${RELAYS_S:-90}
SIDESTEP=${SIDESTEP:-/opt/sidestep/bin/sidestep}
SERVICE=ipc:///run/sidestep/train/daemon.sock

[[ -x $SIDESTEP && -n ${SLURM_JOB_USER:-} && -n ${SLURM_JOB_ID:-} ]] || exit 0

as_user() {
    timeout --kill-after=10 "$PATIENCE_S" runuser -u "$SLURM_JOB_USER" -- env -u SLURM_JOB_ID "$@"
}

runs=${SLURM_JOB_WORK_DIR:-/nowhere}/sidestep-runs
for run_dir in "$runs"/*-slurm-"$SLURM_JOB_ID"; do
    if [[ -d $run_dir ]]; then
        for lock in "$runs"/.relays/*-slurm-"$SLURM_JOB_ID"-*/intake.lock; do
            if [[ -e $lock && $SECONDS -lt $RELAYS_S ]]; then
                as_user flock --timeout $((RELAYS_S - SECONDS)) "$lock" true
            fi
        done
        as_user "$SIDESTEP" drain "$run_dir"
    fi
done

# The node's own daemon, where there is one (deploy/systemd), has the run that task_prolog.sh names.
if [[ -S ${SERVICE#ipc://} ]]; then
    run_id=slurm-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
    as_user "$SIDESTEP" collect --run "$run_id" --address "$SERVICE"
fi
exit 0
