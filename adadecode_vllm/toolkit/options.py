# SPDX-License-Identifier: Apache-2.0
"""Options that several commands read alike."""

from __future__ import annotations

from adadecode_vllm.errors import AdaDecodeError


def parse_layers(text: str) -> list[int]:
    """Parse `8,16,24`.

    Args:
        text: What the user gave for `--exit-layers`.

    Returns:
        The layer counts.

    Raises:
        AdaDecodeError: If it is no list of integers.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise AdaDecodeError(
            f"--exit-layers {text!r}: not a list of integers; separate layer counts "
            "by commas, such as 8,16,24"
        ) from None
