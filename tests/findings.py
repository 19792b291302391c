# SPDX-License-Identifier: Apache-2.0
"""Findings of `adadecode doctor`, and damage for it to find."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adadecode_vllm.toolkit.doctor.finding import Finding

GB = 10**9


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def damage(directory: Path, file: str, **values: Any) -> None:
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
