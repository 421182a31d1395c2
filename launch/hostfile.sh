#!/usr/bin/env bash
# Train on the machines of a DeepSpeed hostfile, over ssh, where there is no scheduler.
#
#   launch/hostfile.sh HOSTFILE CONFIG.yaml [section.key=value ...]
#
# A line of the file is `node0 slots=8`, the number of ranks on that machine; it must be the same on all. Rank 0 is on
# the first machine. All machines have this checkout at the same path, see the same logging.path, and accept ssh without a
# prompt (`ssh node0 true`). SSH may be another ssh command (SSH="ssh -p 2222"). Variables NCCL_*, GLOO_*, TORCH_* and
# OMP_* of this machine are set on all.
#
# SIGTERM, SIGINT and SIGUSR1 reach the ranks, which save and stop: exit code 75, and the same command continues. If one
# machine fails, the others are stopped after two minutes. A mistake in the configuration ends with exit code 2.
#
# DeepSpeed's own launcher starts the ranks too (deepspeed --hostfile HOSTFILE --no_local_rank --module tarflow_scale
# train CONFIG.yaml), but it stops them before they can save, and its exit code is always 1.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ $# -lt 2 ]; then
    echo "usage: launch/hostfile.sh HOSTFILE CONFIG.yaml [section.key=value ...]" >&2
    exit 2
fi
file=$1
shift
if ! lines=$(grep -Ev '^[[:space:]]*(#|$)' "$file"); then
    echo "the hostfile must have a line such as 'node0 slots=8' for each machine (got no such line in $file); add it" >&2
    exit 2
fi
mapfile -t hosts < <(awk '{ print $1 }' <<<"$lines")
slots=$(sed -n 's/.*slots=\([0-9][0-9]*\).*/\1/p' <<<"$lines" | sort -u)
if [ "$(wc -w <<<"$slots")" != 1 ] || [ "$(grep -c 'slots=' <<<"$lines")" != "${#hosts[@]}" ]; then
    echo "all lines of a hostfile must have slots=N with the same N (got ${slots//$'\n'/, } in $file); correct them" >&2
    exit 2
fi
read -ra ssh <<<"${SSH:-ssh}"
pid_file=/tmp/tarflow-scale-$$-$RANDOM # with the number of the machine, which may be the same one twice
settings=()
while IFS= read -r name; do
    settings+=("$name=${!name}")
done < <(compgen -e | grep -E '^(NCCL|GLOO|TORCH|OMP)_')

sessions=()
for number in "${!hosts[@]}"; do
    command=(env "${settings[@]}" "NNODES=${#hosts[@]}" "NODE_RANK=$number" "MASTER_ADDR=${hosts[0]}"
        "MASTER_PORT=${MASTER_PORT:-29500}" launch/torchrun.sh "$slots" "$@")
    # The launcher stores the process id of this shell, to stop it later: ssh forwards no signals.
    "${ssh[@]}" "${hosts[number]}" "cd $(printf %q "$here") && echo \$\$ >$pid_file-$number && exec$(printf ' %q' "${command[@]}")" \
        </dev/null &
    sessions+=($!)
done

tell() { # signal: to the launchers on all machines
    for number in "${!hosts[@]}"; do
        "${ssh[@]}" "${hosts[number]}" "kill -$1 \$(cat $pid_file-$number)" </dev/null >/dev/null 2>&1 || true
    done
}
trap 'tell TERM' TERM INT
trap 'tell USR1' USR1

code=0
failed_at=
running=("${!sessions[@]}")
while [ ${#running[@]} -gt 0 ]; do
    left=()
    for number in "${running[@]}"; do
        session=${sessions[number]}
        if kill -0 "$session" 2>/dev/null; then
            left+=("$number")
            continue
        fi
        one=0
        wait "$session" || one=$?
        if [ "$one" != 0 ]; then
            : "${failed_at:=$SECONDS}"
            [ "$one" = 2 ] || echo "${hosts[number]}: ended with exit code $one" >&2
            # A mistake has priority over a stop, and both over the exit codes that they cause on other machines.
            case $one,$code in 2,* | 75,0 | 75,1 | *,0) code=$one ;; esac
        fi
    done
    running=("${left[@]}")
    if [ -n "$failed_at" ] && [ $((SECONDS - failed_at)) -ge 120 ]; then
        tell KILL
        failed_at=$((SECONDS + 3600))
    fi
    sleep 1 &
    wait $! || true
done
for number in "${!hosts[@]}"; do
    "${ssh[@]}" "${hosts[number]}" "rm -f $pid_file-$number" </dev/null >/dev/null 2>&1 || true
done
exit "$code"
