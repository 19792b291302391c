# SPDX-License-Identifier: Apache-2.0
"""The numbers of result files that plots show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PlotCase:
    """A case of a result file, as it is drawn.

    Attributes:
        variant: The variant's name.
        label: The variant with what was changed.
        batch_size: Requests at a time.
        threshold: The case's own, or that of the whole comparison; None by costs.
        cap: Likewise.
        changed: Keys of the case's own policy.
        ratio: Median, smallest and largest.
        milliseconds: Per generated token, of the first repeat.
        parts: The same by part of the cycle, where it is known.
    """

    variant: str
    label: str
    batch_size: int
    threshold: float | None
    cap: int
    changed: frozenset[str]
    ratio: Mapping[str, float]
    milliseconds: float
    parts: Mapping[str, float] | None


def read_cases(results: Sequence[Mapping[str, Any]]) -> list[PlotCase]:
    """Read the cases of result files.

    Args:
        results: Contents of the files.

    Returns:
        The cases in order; those of a second file with the same label are numbered.
    """
    cases = []
    seen: Counter[tuple[str, int]] = Counter()
    for result in results:
        for case in result["cases"]:
            label, batch_size = case["label"], case["batch_size"]
            seen[label, batch_size] += 1
            number = seen[label, batch_size]
            job, policy, run = result["job"], case["policy"], case["runs"][0]
            per_token = 1000 / max(1, run["tokens"])
            split = case["figures"].get("time_split")
            cases.append(
                PlotCase(
                    variant=case["variant"],
                    # Another file's measurement of the same is not hidden behind it.
                    label=label if number == 1 else f"{label} ({number})",
                    batch_size=batch_size,
                    threshold=policy.get("threshold", job["threshold"]),
                    cap=policy.get(
                        "max_early_predictions", job["max_early_predictions"]
                    ),
                    changed=frozenset(policy),
                    ratio=case["figures"]["ratio"],
                    milliseconds=per_token * run["seconds"],
                    parts=split
                    and {part: per_token * seconds for part, seconds in split.items()},
                )
            )
    return cases
