#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# A file in parts, for a machine that takes only so much at a time:
#
#   benchmarks/gpu/parts.sh split FILE OUT [MIB]   OUT/NAME.part-00, ... and NAME.sha256
#   benchmarks/gpu/parts.sh join DIR NAME          DIR/NAME, if all parts are there
#
# The parts have at most MIB mebibytes (48). join checks the whole and removes its parts;
# a file that is there already is left alone.
set -euo pipefail

case ${1:-} in
split)
    file=${2:?FILE} out=${3:?OUT} mib=${4:-48}
    mkdir -p "$out"
    name=$(basename "$file")
    split --bytes "${mib}M" --numeric-suffixes "$file" "$out/$name.part-"
    (cd "$(dirname "$file")" && sha256sum "$name") >"$out/$name.sha256"
    ls -l "$out"
    ;;
join)
    cd "${2:?DIR}"
    name=${3:?NAME}
    if [[ -e $name ]]; then exit 0; fi
    cat "$name".part-* >"$name.whole"
    if ! sed "s/ $name\$/ $name.whole/" "$name.sha256" | sha256sum --check --quiet; then
        rm "$name.whole"
        echo "error: the parts of $name in $PWD do not make the file; copy all of them" >&2
        exit 1
    fi
    mv "$name.whole" "$name"
    rm "$name".part-*
    ;;
*)
    sed -n '4,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
