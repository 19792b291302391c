# SPDX-License-Identifier: Apache-2.0
"""Writing files that are either whole or not there."""

import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> Path:
    """Write a file under a temporary name, then rename it.

    Args:
        path: The file; its directory exists.
        content: All of it.

    Returns:
        `path`.

    Raises:
        OSError: It cannot be written; what was there before is still there.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            # On the disk before it has its name, so that a crash leaves no empty file.
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
