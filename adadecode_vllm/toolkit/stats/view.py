# SPDX-License-Identifier: Apache-2.0
"""A server's counters as a table for the terminal."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from adadecode_vllm.toolkit.report.text import count, decimal, percent
from adadecode_vllm.toolkit.stats.snapshot import Snapshot


def view(
    url: str, total: Snapshot, lately: Snapshot | None, problem: str | None = None
) -> RenderableType:
    """Draw counters.

    Args:
        url: Where they were read.
        total: Since the server's start.
        lately: Since the reading before; None if there was none.
        problem: Why the newest reading failed.

    Returns:
        What rich prints.
    """
    parts: list[RenderableType] = [Text(f"AdaDecode at {url}", style="bold")]
    if options := _options(total):
        parts.append(Text(options))
    if problem is not None:
        parts.append(Text(problem, style="red"))
    parts.append(_exits(total))
    summary = Table(box=None, show_header=lately is not None, padding=(0, 2, 0, 0))
    summary.add_column("")
    summary.add_column("since start", justify="right")
    if lately is not None:
        summary.add_column(f"last {lately.time:.1f} s", justify="right")
    columns = [total] if lately is None else [total, lately]
    for label, cells in _summary(columns).items():
        summary.add_row(label, *cells)
    parts.append(summary)
    return Group(*parts)


def _options(total: Snapshot) -> str:
    options = total.counted.options
    by_costs = options.get("policy") == "cost"
    decides = ("policy", "ngram") if by_costs else ("threshold", "gate", "ngram")
    named = (*decides, "max_early_predictions", "disable_by_batch_size")
    return ", ".join(
        f"{name} {options[name]}"
        for name in named
        if options.get(name) not in (None, "None")
    )


def _exits(total: Snapshot) -> Table:
    table = Table()
    for heading in (
        "exit after layer",
        "asked",
        "predicted",
        "of asked",
        "accepted",
        "rejected",
        "right",
    ):
        table.add_column(heading, justify="right")
    for layer, counted in total.counted.per_exit.items():
        predicted, checks = counted["early_predictions"], counted["gates"]
        accepted, rejected = counted["accepted"], counted["rejected"]
        table.add_row(
            str(layer),
            count(int(checks)),
            count(int(predicted)),
            percent(_ratio(predicted, checks)),
            count(int(accepted)),
            count(int(rejected)),
            percent(_ratio(accepted, accepted + rejected)),
        )
    return table


def _summary(columns: list[Snapshot]) -> dict[str, list[str]]:
    """Label to one cell for each snapshot."""
    rows = {
        "tokens per target forward": _ratios(
            columns, "generated_tokens", "request_steps"
        ),
        "times the speed without drafts": _ratios(
            columns, "plain_seconds", "compared_seconds"
        ),
        "generated tokens": [
            count(int(part.counted.totals["generated_tokens"])) for part in columns
        ],
        "resumed tokens": [
            count(int(part.counted.totals["resumed_tokens"])) for part in columns
        ],
        "drafting": [
            f"{decimal(part.counted.totals['drafting_seconds'], 1)} s"
            for part in columns
        ],
        "verifying": [
            f"{decimal(part.counted.totals['verifying_seconds'], 1)} s"
            for part in columns
        ],
    }
    for reason in columns[0].counted.dropped:
        if columns[0].counted.dropped[reason]:
            rows[f"dropped, {reason.replace('_', ' ')}"] = [
                f"{count(int(part.counted.dropped[reason]))} tokens" for part in columns
            ]
    return rows


def _ratios(columns: list[Snapshot], part: str, whole: str) -> list[str]:
    """One total by another, for each snapshot."""
    totals = [column.counted.totals for column in columns]
    return [decimal(_ratio(own[part], own[whole]), 2) for own in totals]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
