#!/usr/bin/env bash
# The whole pipeline on real images, on two CPU cores; `make demo` runs it.
#
#   launch/quickstart.sh             into runs/demo; finished steps are skipped
#   launch/quickstart.sh --record    also write evals/results/demo-cpu.json (needs a fresh runs/demo for its times)
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
out=runs/demo
mkdir -p "$out"

stage() { # name command...: run it, show it, note its seconds
    local name=$1 start end
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    start=$(date +%s.%N)
    "$@"
    end=$(date +%s.%N)
    printf '%s\t%s\n' "$name" "$(echo "$start $end" | awk '{printf "%.1f", $2 - $1}')" >>"$out/seconds.tsv"
}

: >"$out/seconds.tsv"
stage prepare tarflow-scale prepare configs/prepare/digits.yaml
stage train launch/torchrun.sh 2 configs/train/digits.yaml
stage evaluate tarflow-scale evaluate configs/evaluate/digits.yaml
stage promote tarflow-scale promote configs/promote/digits.yaml
stage generate tarflow-scale generate configs/generate/digits.yaml
stage report tarflow-scale report configs/report/digits.yaml
stage label_agreement python evals/benchmarks/label_agreement.py --data "$out/data" --generated "$out/generated" \
    --output "$out/label_agreement.json"
printf '\n'
python evals/benchmarks/demo_summary.py "$out" "$@"
echo "next: train on your own images with the nine commands in README.md"
if [ "${1-}" = --record ]; then
    python evals/benchmarks/champion_report.py "$out/registry" digits --output evals/results/champion-digits.json
    tarflow-scale models show configs/models/digits.yaml | sed '/^$/,$d' >evals/results/models-show.txt # not who and where
fi
