# SPDX-License-Identifier: Apache-2.0
"""What a result was made with."""

import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those distributions that are installed, by name."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_commit(directory: Path | None = None) -> str | None:
    """Commit of a checkout, with `-dirty` if it was changed.

    Args:
        directory: A directory in it; None for the working directory.

    Returns:
        None outside of a checkout, or where git is missing.
    """
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
            cwd=directory,
        )
    except OSError:
        return None
    return answer.stdout.strip() or None
