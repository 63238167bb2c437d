#!/usr/bin/env bash
# What the GPU figures of docs/engine.md and docs/training.md come from, on one GPU with nothing else on it.
#
#   bash benchmarks/gpu.sh OUT                       all stages, the most telling first
#   bash benchmarks/gpu.sh OUT tests step-7b         some of them
#   PYTHON=python3 LIMIT_S=120 bash benchmarks/gpu.sh OUT latency-7b
#
# Each stage leaves OUT/STAGE.log and, but for the tests, OUT/STAGE.json. A stage that fails or takes longer than LIMIT_S seconds is
# reported, and the next begins; what its script had stored by then stays.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

declare -A STAGES=(
    [tests]="-m pytest -m gpu -n 0 -q -p no:cacheprovider tests/test_engine.py tests/test_packing.py"
    [step-0.5b]="benchmarks/decode_step.py --geometry qwen2.5-0.5b --repeats 1"
    [step-7b]="benchmarks/decode_step.py --geometry qwen2.5-7b --repeats 1"
    [step-32b]="benchmarks/decode_step.py --geometry qwen2.5-32b --contexts 1024 8192 --skip static --repeats 1"
    [precision]="benchmarks/replay_precision.py --geometry qwen2.5-0.5b --path-tokens 256"
    [training]="benchmarks/train_throughput.py --geometry qwen2.5-7b --lengths 4096 16384 32768"
    [latency-7b]="benchmarks/latency_vs_parallelism.py --geometry qwen2.5-7b --lengths 8192 --paths 1 4 16 --repeats 1"
    [batch-7b]="benchmarks/batch_scaling.py --geometry qwen2.5-7b --batch 1 8 32 128 --tokens 1024 --repeats 1"
    [latency-long]="benchmarks/latency_vs_parallelism.py --geometry qwen2.5-0.5b --lengths 16384 30000 --paths 1 4 16 --repeats 1"
)
ORDER=(tests step-0.5b precision step-7b training latency-7b batch-7b step-32b latency-long)

usage="usage: bash benchmarks/gpu.sh OUT [STAGE ...]; stages: ${ORDER[*]}"
out=${1:?$usage}
shift
for stage in "$@"; do
    [[ -v STAGES[$stage] ]] || { echo "no stage is named $stage; $usage" >&2; exit 2; }
done
(($# > 0)) || set -- "${ORDER[@]}"
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
failed=0
for stage in "$@"; do
    begin=$SECONDS
    read -ra command <<<"${STAGES[$stage]}"
    [[ $stage == tests ]] || command+=(--device "${DEVICE:-cuda}" --output "$out/$stage.json")
    timeout "${LIMIT_S:-600}" "${PYTHON:-python}" "${command[@]}" >"$out/$stage.log" 2>&1
    status=$?
    ((status == 0)) || failed=1
    echo "== $stage: exit $status after $((SECONDS - begin)) s"
    grep -v '^{"benchmark"' "$out/$stage.log" | tr '\r' '\n' | tail -n 30
done
exit $failed
