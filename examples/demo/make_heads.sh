#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Make the demo's heads anew from its model, with the commands that users have:
#
#   make setup
#   examples/demo/make_heads.sh WORK [HEADS]
#
# WORK receives texts, data, the trained heads and their evaluation; HEADS, if given, the
# heads, their card and how they were trained.
#
#   LAYERS     exits (2,4,8)
#   MEMORY=1   heads that read the state of the token before, too, and begin with least
#              squares
set -euo pipefail
work=$(realpath -m "$1")
heads=${2:+$(realpath -m "$2")}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
model=examples/demo/model
python=.venv/bin/python
adadecode=(scripts/run.sh .venv/bin/adadecode)
engine='{"max_model_len": 512, "enforce_eager": true, "kv_cache_memory_bytes": 268435456}'

"$python" examples/demo/write_texts.py "$work"

answer() { # the model's own answers, greedily: NAME TOKENS
    "${adadecode[@]}" data "$work/data/$1" --model "$model" --input "$work/$1.jsonl" \
        --field text --plain --dtype float32 --max-new-tokens "$2" --engine "$engine"
}
answer problems 120
answer heldout_problems 120
answer heldout_code 64
"${adadecode[@]}" data "$work/data/code" --model "$model" --input "$work/code.jsonl" \
    --field text --finished --plain --max-length 256

preset=quick
if [[ -n ${MEMORY:-} ]]; then
    preset=best
fi
"${adadecode[@]}" train "$model" "$work/heads" --exit-layers "${LAYERS:-2,4,8}" \
    --preset "$preset" --data "$work/data/problems" --data "$work/data/code" --batch-size 16

for kind in heldout_problems heldout_code; do
    "${adadecode[@]}" eval "$model" "$work/heads" --data "$work/data/$kind" \
        --output "$work/evaluation/$kind"
done

if [[ -n $heads ]]; then
    mkdir -p "$heads"
    cp "$work/heads/config.json" "$work/heads/model.safetensors" "$heads/"
    sed "s#$work#WORK#g" "$work/heads/run/run.yaml" >"$heads/training.yaml"
    sed "s#$work/heads#${heads#"$PWD"/}#g" "$work/heads/README.md" >"$heads/README.md"
fi
