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
#   HALVES=1                           summaries of each article's two halves, too
#   DTYPE                              the model's (float32); bfloat16 is faster on CPUs that
#                                      have AVX-512 for it
#   LAYERS                             exits (2,4,8,15)
#   MEMORY=1                           heads that read the state of the token before, too,
#                                      and begin with least squares
#   EPOCHS                             passes over the answers (6)
set -euo pipefail
if (($# < 4)); then
    sed -n '5,23s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
work=$(realpath -m "$1")
gsm8k=$(realpath "$2")
mbpp=$(realpath "$3")
xsum=$(realpath "$4")
heads=${5:+$(realpath -m "$5")}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
model=examples/smollm2/model
dtype=${DTYPE:-float32}
adadecode=(scripts/run.sh .venv/bin/adadecode)
engine='{"max_model_len": 2048, "max_num_seqs": 128, "kv_cache_memory_bytes": 4294967296}'

answer() { # the model's own answers, greedily: TASK FILE ROWS [NAME]
    "${adadecode[@]}" data "$work/data/${4:-$1}" --model "$model" --task "$1" --input "$2" \
        --count "$3" --dtype "$dtype" --max-new-tokens 256 --engine "$engine"
}
answer gsm8k "$gsm8k" "${ROWS_GSM8K:-500}"
answer mbpp "$mbpp" "${ROWS_MBPP:-500}"
answer xsum "$xsum" "${ROWS_XSUM:-200}"
data=(--data "$work/data/gsm8k" --data "$work/data/mbpp" --data "$work/data/xsum")
if [[ -n ${HALVES:-} ]]; then
    halves=$work/xsum_halves.jsonl
    .venv/bin/python - "$xsum" "$halves" <<'PYTHON'
import json
import sys

with open(sys.argv[1]) as articles, open(sys.argv[2], "w") as halves:
    for article in map(json.loads, articles):
        lines = article["document"].split("\n")
        middle = len(lines) // 2
        parts = {"a": lines[:middle], "b": lines[middle:]} if len(lines) > 3 else {}
        for letter, part in parts.items():
            half = {"id": f"{article['id']}{letter}", "document": "\n".join(part)}
            halves.write(json.dumps({**article, **half}) + "\n")
PYTHON
    answer xsum "$halves" "$(wc -l <"$halves")" xsum_halves
    data+=(--data "$work/data/xsum_halves")
fi

rate=2e-3
memory=()
if [[ -n ${MEMORY:-} ]]; then
    rate=1e-3
    memory=(--memory --start ridge)
fi
# Training does not begin where its heads are complete.
if [[ ! -e $work/heads/config.json || -e $work/heads/run/checkpoint.safetensors ]]; then
    "${adadecode[@]}" train "$model" "$work/heads" --exit-layers "${LAYERS:-2,4,8,15}" \
        "${data[@]}" --draft-vocabulary 4096 --heads-dtype bfloat16 --batch-size 16 \
        --learning-rate "$rate" --epochs "${EPOCHS:-6}" --dtype "$dtype" \
        --cache-dir "$work/states" "${memory[@]}"
fi

if [[ -n $heads ]]; then
    mkdir -p "$heads"
    cp "$work/heads/config.json" "$work/heads/model.safetensors" "$heads/"
    sed "s#$work#WORK#g" "$work/heads/run/run.yaml" >"$heads/training.yaml"
    sed "s#$work/heads#${heads#"$PWD"/}#g" "$work/heads/README.md" >"$heads/README.md"
fi
