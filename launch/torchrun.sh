#!/usr/bin/env bash
# Train on one machine with N ranks; or on several, by starting it on each with the variables below.
#
#   launch/torchrun.sh N CONFIG.yaml [section.key=value ...]
#
#   NNODES=4 RDZV_ENDPOINT=node0:29500 launch/torchrun.sh 8 CONFIG.yaml     on every node; logging.path must be a
#                                                                           folder that all nodes share
#
# The configuration is checked once, by a dry run, before any rank starts: a mistake is one line and exit code 2.
# SIGTERM, SIGUSR1 (what schedulers send before they take the machine) and training.max_seconds make the ranks save and
# stop, with exit code 75: start it again to go on.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
export PATH="$here/.venv/bin:$PATH"
if [ $# -lt 2 ]; then
    echo "usage: launch/torchrun.sh NUM_RANKS CONFIG.yaml [section.key=value ...]" >&2
    exit 2
fi
ranks=$1
shift
nodes=${NNODES:-1}

# Cores shared among the ranks of this machine; torch reads it when it starts.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + ranks - 1) / ranks))}
# A checkpoint may take longer than the 30 seconds after which torchrun kills ranks that were told to stop.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

RANK=0 WORLD_SIZE=$((ranks * nodes)) LOCAL_WORLD_SIZE=$ranks python -m tarflow_scale train "$@" --dry-run >/dev/null

if [ "$nodes" = 1 ]; then
    rendezvous=(--standalone)
else
    rendezvous=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "${RDZV_ENDPOINT:?set it to HOST:PORT of one node}")
fi

# torchrun has one exit code for every failure of a rank; the ranks write theirs here.
TARFLOW_SCALE_EXIT_CODES=$(mktemp)
export TARFLOW_SCALE_EXIT_CODES
trap 'rm -f "$TARFLOW_SCALE_EXIT_CODES"' EXIT
torchrun "${rendezvous[@]}" --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --nproc-per-node "$ranks" \
    -m tarflow_scale train "$@" &
launcher=$!
for name in TERM INT HUP QUIT USR1; do
    # shellcheck disable=SC2064  # the number is known now
    trap "kill -$name $launcher 2>/dev/null || true" "$name"
done
code=0
wait "$launcher" || code=$?
while kill -0 "$launcher" 2>/dev/null; do # a signal ends the wait, not the launcher
    code=0
    wait "$launcher" || code=$?
done
if [ "$code" != 0 ]; then
    for known in 75 2; do
        if grep -qx "$known" "$TARFLOW_SCALE_EXIT_CODES"; then
            exit "$known"
        fi
    done
fi
exit "$code"
