#!/usr/bin/env bash
# Train on one machine with N ranks, or on several: start it on each with the variables below.
#
#   launch/torchrun.sh N CONFIG.yaml [section.key=value ...]
#
#   NNODES=4 RDZV_ENDPOINT=node0:29500 launch/torchrun.sh 8 CONFIG.yaml     on every node, of which node0 is one
#                                                                           (rendezvous c10d: nodes need no numbers)
#   NNODES=4 NODE_RANK=2 MASTER_ADDR=node0 MASTER_PORT=29500 launch/torchrun.sh 8 CONFIG.yaml
#                                                                           on node 2 (static: nodes are numbered from
#                                                                           0 as schedulers do; node0 is number 0)
#
# logging.path must be a folder that all nodes share. The environment of the ranks is in launch/env.sh.
#
# The configuration is checked once, by a dry run, before any rank starts: a mistake is one line and exit code 2.
# SIGTERM and SIGUSR1 (from a scheduler that needs the machine) and training.max_seconds make the ranks save and stop
# with exit code 75; start it again to continue. After exit codes 75 and 2 and after Ctrl-C torchrun prints no errors.
set -euo pipefail
trap 'exit 75' TERM USR1 # there is nothing to save yet
[ -e /dev/fd/0 ] || exec </dev/null # files that are opened later would get the numbers of closed streams
[ -e /dev/fd/1 ] || exec >/dev/null
[ -e /dev/fd/2 ] || exec 2>/dev/null
trap '' PIPE
say() { echo "$1" 2>/dev/null || true; } # a full disk or a reader that has left stops no training
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$here/.venv/bin:$PATH"
if [ $# -lt 2 ]; then
    echo "usage: launch/torchrun.sh NUM_RANKS CONFIG.yaml [section.key=value ...]" >&2
    exit 2
fi
ranks=$1
shift
nodes=${NNODES:-1}
# shellcheck source=launch/env.sh
. "$here/launch/env.sh"

# Each of these steps imports PyTorch, which takes seconds on a quiet machine and minutes on a slow file system.
say "checking the configuration ($1)"
RANK=${NODE_RANK:-0} WORLD_SIZE=$((ranks * nodes)) LOCAL_WORLD_SIZE=$ranks \
    python -m tarflow_scale train "$@" --dry-run >/dev/null

if [ "$nodes" = 1 ]; then
    rendezvous=(--standalone)
elif [ -n "${NODE_RANK-}" ]; then
    rendezvous=(--nnodes "$nodes" --node-rank "$NODE_RANK" --master-addr "${MASTER_ADDR:?set it to the node of rank 0}")
    rendezvous+=(--master-port "${MASTER_PORT:-29500}")
else
    rendezvous=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "${RDZV_ENDPOINT:?set it to HOST:PORT of one node}")
    rendezvous+=(--rdzv-id "${RDZV_ID:-tarflow-scale}")
fi

say "starting $ranks rank$([ "$ranks" = 1 ] || echo s)$([ "$nodes" = 1 ] || echo " on this machine, of $nodes machines")"
trap '' TERM USR1 INT HUP QUIT # until the launcher listens
exec python "$here/launch/ranks.py" "${rendezvous[@]}" --nproc-per-node "$ranks" -m tarflow_scale train "$@"
