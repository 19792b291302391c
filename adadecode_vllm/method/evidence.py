# SPDX-License-Identifier: Apache-2.0
"""What speaks for a draft by lookup: how much matches, and whether all places agree."""

from __future__ import annotations

from enum import IntEnum

MOST_MATCHES = 8
"""Matching tokens that are told apart."""


class Agreement(IntEnum):
    """How the places where as many tokens match agree on what follows."""

    DIVIDED = 0
    """None of several tokens follows in more than half of them."""
    LIKELY = 1
    """There is one place alone, or the token follows in more than half of several."""
    UNANIMOUS = 2
    """The token follows in all of several."""


KINDS = MOST_MATCHES * len(Agreement)
"""Kinds of evidence, which are numbered from 0 on."""

RIGHT = (
    *(0.15, 0.2, 0.25, 0.3, 0.3, 0.3, 0.35, 0.4),
    *(0.35, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85),
    *(0.6, 0.8, 0.85, 0.85, 0.9, 0.9, 0.95, 0.97),
)
"""By kind, the share of drafts that are right, before any were seen.

These are near what SmolLM2's answers to GSM8K, MBPP and XSum show."""


def evidence(matches: int, agreement: int) -> int:
    """The kind of evidence.

    Args:
        matches: How many tokens before the draft match; 1 or more. Those beyond
            `MOST_MATCHES` make no difference.
        agreement: An `Agreement`.

    Returns:
        0 .. ``KINDS - 1``.
    """
    return agreement * MOST_MATCHES + min(matches, MOST_MATCHES) - 1
