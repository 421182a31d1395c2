#!/usr/bin/env bash
# Can this container still do its work? What fails while processes look alive: a full disk, full shared memory, a
# device that went away, a Ray cluster that no longer takes this node. Says which, and exits with 1.
#
#   docker/healthcheck.sh [--gpu] [--ray HOST:PORT] [--port PORT]
#
#   --gpu              a device must answer
#   --ray HOST:PORT    the head of the Ray cluster must answer there, and take this container's token
#   --port PORT        something must listen on this port of this container, as a Ray node does
set -euo pipefail
runs=$(cd "$(dirname "$0")/.." && pwd)/runs
least_disk_mib=256
least_shared_mib=8

unhealthy() {
    echo "unhealthy: $*"
    exit 1
}

free_mib() {
    df --output=avail --block-size=1M "$1" | tail -n 1 | tr -d ' '
}

[ -w "$runs" ] || unhealthy "$runs is not writable to user $(id -u); give its volume to that user"
free=$(free_mib "$runs")
[ "$free" -ge "$least_disk_mib" ] || unhealthy "$runs has $free MiB left, fewer than $least_disk_mib; make room"
free=$(free_mib /dev/shm)
[ "$free" -ge "$least_shared_mib" ] ||
    unhealthy "/dev/shm has $free MiB left, fewer than $least_shared_mib; start the container with a larger --shm-size"

while [ $# -gt 0 ]; do
    case $1 in
    --gpu)
        nvidia-smi --list-gpus 2>/dev/null | grep -q . ||
            unhealthy "no GPU answers; start the container with --gpus all, or look into dmesg"
        shift
        ;;
    --ray)
        timeout 20 ray health-check --address "$2" >/dev/null 2>&1 ||
            unhealthy "no Ray head at $2 takes this container's token; look at its log, and at RAY_AUTH_TOKEN of both"
        shift 2
        ;;
    --port)
        (exec 3<>"/dev/tcp/$HOSTNAME/$2") 2>/dev/null || unhealthy "nothing listens on port $2; look at the log"
        shift 2
        ;;
    *)
        echo "usage: docker/healthcheck.sh [--gpu] [--ray HOST:PORT] [--port PORT]" >&2
        exit 2
        ;;
    esac
done
