# SPDX-License-Identifier: Apache-2.0
"""Texts that tell whether anybody has changed them since they were written."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

_SIGNATURE = re.compile(r"\n<!-- written by adadecode-vllm: ([0-9a-f]{64}) -->\n\Z")


def sign(text: str) -> str:
    """Add a comment with a hash of the text.

    Args:
        text: Markdown.

    Returns:
        The same with a last line that readers do not see.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}\n<!-- written by adadecode-vllm: {digest} -->\n"


def change_signed(text: str, change: Callable[[str], str]) -> str:
    """Change a text; one that was as written is so again.

    Args:
        text: What `sign` returned, or any other text.
        change: Changes it.

    Returns:
        The changed text, with a comment that fits if there was one before.
    """
    unsigned = _unsigned(text)
    return change(text) if unsigned is None else sign(change(unsigned))


def read_as_written(path: Path) -> str | None:
    """The text that a file was signed with; None where it was changed since.

    Args:
        path: A file. A link may be to anybody's, and is not read.
    """
    if path.is_symlink():
        return None
    try:
        return _unsigned(path.read_bytes().decode())
    except (OSError, UnicodeDecodeError):
        return None


def is_as_written(path: Path) -> bool:
    """Whether a file holds what `sign` returned, to the letter."""
    return read_as_written(path) is not None


def _unsigned(text: str) -> str | None:
    """A text without its comment; None if it was changed, or has none."""
    match = _SIGNATURE.search(text)
    if match is None:
        return None
    unsigned = text[: match.start()]
    return unsigned if sign(unsigned) == text else None
