#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Run a command with the libraries that vLLM recommends to preload on CPU:
#
#   scripts/run.sh .venv/bin/python examples/demo/run_demo.py
#
# Intel's OpenMP runtime (in .venv, from intel-openmp) and tcmalloc, each where found.
# Both only affect speed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

preload=()
if [[ -e $root/.venv/lib/libiomp5.so ]]; then
    preload+=("$root/.venv/lib/libiomp5.so")
fi
for directory in /usr/lib/"$(uname -m)"-linux-gnu /usr/lib64 /usr/lib /usr/local/lib; do
    for name in libtcmalloc_minimal.so.4 libtcmalloc.so.4; do
        if [[ -e $directory/$name ]]; then
            preload+=("$directory/$name")
            break 2
        fi
    done
done

if ((${#preload[@]})); then
    LD_PRELOAD=$(IFS=: && echo "${preload[*]}")${LD_PRELOAD:+:$LD_PRELOAD}
    export LD_PRELOAD
fi
exec "$@"
