#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Self-check, parity and speed on a machine with one GPU and no network:
#
#   benchmarks/gpu/run.sh KIT OUT [STAGE...]
#
# KIT is a folder with vLLM for such a machine (its parts, manifest and
# install_kit.sh); - uses the vLLM that is installed. OUT receives the result files.
# Stages, by default all of them; meant to fit in 9 minutes on one H200:
#
#   check   vLLM itself on a tiny random model (part of the kit)
#   parity  tests/gpu: texts equal plain vLLM's, float32 and bfloat16
#   speed   the demo model widened to Llama 3.1 8B's shape: plain vLLM, AdaDecode,
#           one fixed exit with every prediction submitted, never predicting, n-gram;
#           1, 4, 16 and 64 requests at a time; one JSON
#   real    only if asked for: SmolLM2-135M-Instruct in that shape, at the defaults, which
#           is real acceptance at that cost. PARTS (WORK/parts) holds the GGUF file, or
#           its parts (of `split`), and the wheel of gguf; docs/gpu.md has the calls
#
# A stage that fails or takes longer than it may (PARITY_SECONDS, SPEED_SECONDS) does not
# keep the next one from running; the exit status tells. SHAPE, VARIANTS, BATCHES, ROUNDS,
# TOKENS and REPEATS change what is measured, SIDE how many engines are loaded beside
# plain vLLM (5 hold 100 GiB in Llama 3.1 8B's shape). The stage real also takes
# REAL_HEADS, REAL_CONFIG (AdaDecode's options), PROMPTS (their number), DATASET and
# DATASET_PATH (the benchmark's --dataset-name and --dataset-path; otherwise the prompts of
# examples/smollm2).
set -euo pipefail
kit=${1:?usage: run.sh KIT OUT [STAGE...]}
out=${2:?usage: run.sh KIT OUT [STAGE...]}
shift 2
stages=${*:-check parity speed}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mkdir -p "$out" && out=$(cd "$out" && pwd)
work=${WORK:-/tmp/adadecode-gpu}
mkdir -p "$work"
python=${PYTHON:-python3}
shape=${SHAPE:-llama-3.1-8b}
failed=0

say() { echo "=== $(date +%T) $*"; }
wants() { [[ " $stages " == *" $1 "* ]]; }
fail() {
    say "FAILED: $*"
    failed=1
}

if [[ $kit != - ]]; then
    say "vLLM from $kit"
    if [[ ! -e $work/site/env.sh ]]; then
        check=0
        if wants check; then check=1; fi
        CHECK=$check bash "$kit/install_kit.sh" "$kit" "$work/site" random
    fi
    # shellcheck disable=SC1091
    . "$work/site/env.sh"
fi

say "this project"
rm -rf "$root/build" # of an earlier state of the sources
"$python" -m pip install --quiet --no-deps --no-build-isolation --upgrade \
    --target "$work/project" "$root"
# The installed package first, then tests and benchmarks beside their sources.
export PYTHONPATH=$work/project:${PYTHONPATH:+$PYTHONPATH:}$root PYTHONSAFEPATH=1
cd "$root"

# Tests NAME [PYTEST ARGS...]: without the options of plugins that such a machine lacks,
# and without the sources before the installed package. Triton multiplies float32 in
# TF32 unless it is told otherwise, which would leave no text token-identical.
tests() {
    local name=$1
    shift
    TRITON_F32_DEFAULT=ieee timeout -k 10 "${PARITY_SECONDS:-240}" \
        "$python" -m pytest -m gpu -q -o addopts=--import-mode=importlib \
        -o pythonpath= --junitxml "$out/parity_$name.xml" "$@" \
        >"$out/parity_$name.log" 2>&1 && say "parity $name passed"
}

device=${DEVICE:-cuda}

# Widen SOURCE HEADS NAME: SOURCE in the large shape, at $work/NAME.
widen() {
    if [[ -e $work/$3/widen.json ]]; then return; fi
    rm -rf "${work:?}/$3"
    "$python" benchmarks/widen.py "$1" "$work/$3" --heads "$2" --preset "$shape" \
        --device "$device"
}
widen_demo() { widen examples/demo/model examples/demo/heads "$shape"; }
# Widen_real HEADS NAME: SmolLM2-135M-Instruct with these heads, at $work/NAME.
widen_real() {
    local parts=${PARTS:-$work/parts} gguf=SmolLM2-135M-Instruct.Q4_1.gguf
    if [[ ! -e $parts/$gguf ]]; then
        cat "$parts/$gguf".part-* >"$parts/$gguf.whole"
        mv "$parts/$gguf.whole" "$parts/$gguf"
    fi
    "$python" -m pip install --quiet --no-deps --no-index --find-links "$parts" \
        --upgrade --target "$work/gguf" gguf
    PYTHONPATH=$work/gguf:$PYTHONPATH "$python" examples/smollm2/fetch.py \
        "$work/smollm2" --downloads "$parts"
    widen "$work/smollm2" "$1" "$2"
}

# Compare NAME VARIANTS BATCHES PROMPTS [ARGS...]: plain vLLM and others, side by side.
compare() {
    local name=$1 variants=$2 batches=$3 prompts=$4
    shift 4
    timeout -k 10 "${SPEED_SECONDS:-400}" \
        "$python" benchmarks/benchmark_throughput.py \
        --model "$work/$name/model" --adadecode-heads "$work/$name/heads" \
        --dtype bfloat16 --max-model-len 1024 --max-num-seqs 64 \
        --gpu-memory-utilization 0.1 --kv-cache-gib "${KV_GIB:-4}" \
        --side-by-side "${SIDE:-5}" --start-together "${SIDE:-5}" \
        --variants "${VARIANTS:-$variants}" --batch-sizes "${BATCHES:-$batches}" \
        --num-prompts "$prompts" --rounds "${ROUNDS:-2}" \
        --output-len "${TOKENS:-128}" --ignore-eos --repeats "${REPEATS:-2}" \
        --engine-logs "$work/logs" --output-json "$out/gpu_$name.json" "$@" |
        tee "$out/gpu_$name.md" || fail "the comparison $name"
    tail -n 400 "$work"/logs/*.log >"$out/engines_$name.log" 2>/dev/null || true
}

if wants parity; then
    say "parity"
    # Side by side: the engines are small and most of the time compiles.
    jobs=()
    tests float32 tests/gpu/test_model_runner_v2.py -k float32 & jobs+=($!)
    tests bfloat16 tests/gpu/test_model_runner_v2.py -k bfloat16 & jobs+=($!)
    tests kv tests/gpu/test_kv_cache_dtypes.py tests/gpu/test_packed_attention.py & jobs+=($!)
    tests sleep tests/gpu/test_sleep.py & jobs+=($!)
    if wants speed; then widen_demo & jobs+=($!); fi
    for job in "${jobs[@]}"; do
        wait "$job" || fail "a job of the parity stage; its log is in $out"
    done
    tail -n 25 "$out"/parity_*.log
fi

if wants speed; then
    say "the demo model in the shape of $shape"
    widen_demo
    say "speed"
    # The heads' exits 2, 4 and 8 of 16 layers are 4, 8 and 16 of 32.
    compare "$shape" baseline,adadecode,paper,submit-all:8,threshold-1,ngram 1,4,16,64 64
fi

if wants real; then
    say "SmolLM2-135M-Instruct in the shape of $shape"
    heads=${REAL_HEADS:-examples/smollm2/memory-heads}
    name=real-$(basename "$heads")-$shape
    widen_real "$heads" "$name"
    say "real acceptance"
    compare "$name" baseline,adadecode,threshold-1,ngram:5 1,4,8 "${PROMPTS:-8}" \
        --dataset-name "${DATASET:-text}" \
        --dataset-path "${DATASET_PATH:-examples/smollm2/prompts/problems.jsonl}" \
        --adadecode-config "${REAL_CONFIG:-"{}"}"
fi
say "done"
exit "$failed"
