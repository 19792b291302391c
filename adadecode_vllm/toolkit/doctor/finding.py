# SPDX-License-Identifier: Apache-2.0
"""What one check found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        check: What was looked at, in a word or two.
        status: ``problem`` stops a server, ``warning`` slows it or is unknown.
        text: What was found, and why it matters, in sentences.
        remedy: What to do about it, in sentences; empty where nothing is to be done.
        figures: The numbers behind the text, for machines.
    """

    check: str
    status: Status
    text: str
    remedy: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The finding for JSON."""
        return asdict(self)


def all_well(findings: list[Finding]) -> bool:
    """Whether nothing stops a server."""
    return all(finding.status != "problem" for finding in findings)
