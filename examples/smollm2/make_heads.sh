#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Make the heads of SmolLM2-135M-Instruct anew, with the commands that users have:
#
#   make setup real-model
#   examples/smollm2/make_heads.sh WORK GSM8K MBPP XSUM [HEADS]
#
# GSM8K, MBPP and XSUM are published files: the training split of GSM8K, all of MBPP, and
# articles of XSum to train on. For the shipped heads these were the first 600 of the test
# split in the order of their ids; the other 400 measure them. The model answers the prompts
# itself. WORK receives the answers, the states and the trained heads; HEADS, if given, the
# heads with their card.
# Every step goes on where an interrupted one stopped: give the same command again.
#
#   ROWS_GSM8K, ROWS_MBPP, ROWS_XSUM   prompts of each kind (500, 500, 200)
#   LAYERS                             exits (2,4,8,15)
#   MEMORY=1                           heads that read the state of the token before, too,
#                                      and begin with least squares
#   EPOCHS                             passes over the answers (6)
set -euo pipefail
if (($# < 4)); then
    sed -n '5,20s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
work=$(realpath -m "$1")
gsm8k=$(realpath "$2")
mbpp=$(realpath "$3")
xsum=$(realpath "$4")
heads=${5:+$(realpath -m "$5")}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
model=examples/smollm2/model
adadecode=(scripts/run.sh .venv/bin/adadecode)
engine='{"max_model_len": 2048, "max_num_seqs": 128, "kv_cache_memory_bytes": 4294967296}'

answer() { # the model's own answers, greedily: TASK FILE ROWS
    "${adadecode[@]}" data "$work/data/$1" --model "$model" --task "$1" --input "$2" \
        --count "$3" --dtype float32 --max-new-tokens 256 --engine "$engine"
}
answer gsm8k "$gsm8k" "${ROWS_GSM8K:-500}"
answer mbpp "$mbpp" "${ROWS_MBPP:-500}"
answer xsum "$xsum" "${ROWS_XSUM:-200}"

rate=2e-3
memory=()
if [[ -n ${MEMORY:-} ]]; then
    rate=1e-3
    memory=(--memory --start ridge)
fi
"${adadecode[@]}" train "$model" "$work/heads" --exit-layers "${LAYERS:-2,4,8,15}" \
    --data "$work/data/gsm8k" --data "$work/data/mbpp" --data "$work/data/xsum" \
    --draft-vocabulary 4096 --heads-dtype bfloat16 --batch-size 16 --learning-rate "$rate" \
    --epochs "${EPOCHS:-6}" --cache-dir "$work/states" "${memory[@]}"

if [[ -n $heads ]]; then
    mkdir -p "$heads"
    cp "$work/heads/config.json" "$work/heads/model.safetensors" "$heads/"
    sed "s#$work#WORK#g" "$work/heads/run/run.yaml" >"$heads/training.yaml"
    sed "s#$work/heads#${heads#"$PWD"/}#g" "$work/heads/README.md" >"$heads/README.md"
fi
