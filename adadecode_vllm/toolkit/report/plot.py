# SPDX-License-Identifier: Apache-2.0
"""A plot of the report."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Plot:
    """A plot, ready for a file or a page.

    Attributes:
        name: File name without suffix.
        title: Heading.
        caption: What is seen, in one or two sentences; also the alternative text.
        png: The file's content.
    """

    name: str
    title: str
    caption: str
    png: bytes


def missing_as_nan(value: float | None) -> float:
    """NaN for a missing value: matplotlib leaves a gap there."""
    return math.nan if value is None else value
