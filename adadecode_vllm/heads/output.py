# SPDX-License-Identifier: Apache-2.0
"""Which directory may become a heads directory: never one that holds something else.

Nothing here imports torch.
"""

import json
import re
from collections.abc import Container
from pathlib import Path

from safetensors import SafetensorError, safe_open

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.files import without_temporary
from adadecode_vllm.heads.config import MODEL_TYPE
from adadecode_vllm.heads.files import CONFIG_FILE, DRAFT_TOKENS, WEIGHTS_FILE

_OURS = re.compile(rf"exit_heads\.\d+\.(weight|memory)|{DRAFT_TOKENS}")
_SET_ASIDE = re.compile(r"(.+)\.old-\d+-[0-9a-f]{16}")


def holds_heads(directory: Path) -> bool:
    """Whether a directory holds exit heads, whole or damaged.

    Args:
        directory: Any path.

    Returns:
        Whether its `config.json` is that of exit heads or, where there is none, its
        `model.safetensors` holds nothing but exit heads.
    """
    config = directory / CONFIG_FILE
    if config.exists():
        return _model_type(config) == MODEL_TYPE
    return _holds_exits(directory / WEIGHTS_FILE)


def check_replaceable(directory: Path, flag: str = "directory") -> None:
    """Refuse a directory whose `config.json` or weights are not those of exit heads.

    Args:
        directory: Where heads are to be written; it may be missing.
        flag: The option or argument that named it.

    Raises:
        AdaDecodeError: It is a file, or holds something else under these names.
    """
    if directory.exists() and not directory.is_dir():
        raise AdaDecodeError(
            f"{flag} {directory}: the path is a file; give the name of a directory"
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        path = directory / name
        if (path.exists() or path.is_symlink()) and not holds_heads(directory):
            raise AdaDecodeError(
                f"{flag} {directory}: it holds {name}, but not that of exit heads; "
                "give another directory, so that nothing is lost"
            )


def check_output(
    directory: Path, flag: str, *, overwrite: bool, ours: Container[str] = ()
) -> None:
    """Refuse a directory that a command must not write heads to.

    Args:
        directory: What the user named; it may be missing.
        flag: The argument that named it.
        overwrite: Whether heads that are there may be replaced.
        ours: Names that may stand there without heads, because the command itself put
            them there.

    Raises:
        AdaDecodeError: It holds heads that may not be replaced, or other files without
            heads.
    """
    check_replaceable(directory, flag)
    if holds_heads(directory):
        if overwrite:
            return
        raise AdaDecodeError(
            f"{flag} {directory}: it already holds heads; give another directory, or "
            "pass --overwrite to replace them"
        )
    if not directory.is_dir():
        return
    for name in sorted(path.name for path in directory.iterdir()):
        # Hidden files are those of a version control.
        if not (name.startswith(".") or name in ours or _is_left_over(name)):
            raise AdaDecodeError(
                f"{flag} {directory}: it holds {name} but no heads; give a directory "
                "that is new, empty or holds heads"
            )


def _is_left_over(name: str) -> bool:
    """Whether a name is that of a file of an interrupted writing of heads."""
    aside = _SET_ASIDE.fullmatch(name)
    whole = aside[1] if aside else without_temporary(name)
    return whole != name and whole in (CONFIG_FILE, WEIGHTS_FILE)


def _model_type(path: Path) -> object:
    """`model_type` of a `config.json`; None where it cannot be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values.get("model_type") if isinstance(values, dict) else None


def _holds_exits(path: Path) -> bool:
    """Whether a file is safetensors with exit heads and nothing else."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="np") as tensors:
            return all(map(_OURS.fullmatch, tensors.keys()))
    except (SafetensorError, OSError):
        return False
