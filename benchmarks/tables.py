# SPDX-License-Identifier: Apache-2.0
"""Markdown tables of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = (
    "batch",
    "variant",
    "tok/s (min-max)",
    "ratio (min-max)",
    "TTFT ms p50 / p99",
    "TPOT ms p50 / p99",
    "tokens per forward",
    "early predictions per token",
    "accepted, by exit",
    "identical texts",
    "efficiency",
    "peak MiB (private)",
)


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """One row per case, then a line per variant that did not run.

    Args:
        results: Contents of result files of one machine and one workload.

    Returns:
        Markdown.
    """
    cases = [case for result in results for case in result["cases"]]
    graded = any("right" in case["figures"] for case in cases)
    columns = [*_COLUMNS, "right answers"] if graded else list(_COLUMNS)
    lines = [row(columns), row(["---"] * len(columns))]
    for case in cases:
        cells = _cells(case)
        if graded:
            cells.append(right_cell(case["figures"].get("right")))
        lines.append(row(cells))
    for result in results:
        lines += variant_notes(result)
    return "\n".join(lines)


def variant_notes(result: Mapping[str, Any]) -> list[str]:
    """Lines to stand below a table: the variants that did not run, and why."""
    notes = [
        f"{variant} {entry['status']}: it {entry['reason']}."
        if entry["status"] == "skipped"
        else f"{variant} {entry['status']}: {entry['reason']}"
        for variant, entry in result["variants"].items()
        if entry["status"] != "ran"
    ]
    return ["", *notes] if notes else []


def spread(figures: Mapping[str, float] | None, form: str = ".2f") -> str:
    """A median with its extremes, such as ``2.10 (2.05-2.12)``."""
    if figures is None:
        return "-"
    low, high = format(figures["min"], form), format(figures["max"], form)
    return f"{format(figures['median'], form)} ({low}-{high})"


def percent(share: float | None) -> str:
    """A share such as ``93.4 %``, or ``-``."""
    return "-" if share is None else f"{100 * share:.1f} %"


def _cells(case: Mapping[str, Any]) -> list[str]:
    figures = case["figures"]
    early = figures["early_predictions"]
    accepted = percent(figures["acceptance"])
    if early is not None and early["acceptance"] is not None:
        by_exit = " / ".join(percent(share) for _, _, share in early["by_exit"])
        accepted = f"{accepted} ({by_exit})" if len(early["by_exit"]) > 1 else accepted
    return [
        str(case["batch_size"]),
        case["label"],
        spread(figures["tokens_per_s"]),
        spread(figures["ratio"]),
        latency(figures["ttft_ms"]),
        latency(figures["tpot_ms"]),
        f"{figures['tokens_per_forward']:.2f}",
        "-" if early is None else f"{early['rate']:.2f}",
        accepted,
        texts_cell(figures.get("texts")),
        spread(figures.get("efficiency")),
        f"{figures['peak_memory_mib']:.0f} ({figures['private_memory_mib']:.0f})",
    ]


def latency(figures: Mapping[str, float | None]) -> str:
    """Median and 99th percentile in milliseconds."""
    values = [figures["p50"], figures["p99"]]
    return " / ".join("-" if value is None else f"{value:.1f}" for value in values)


def texts_cell(counts: Mapping[str, int] | None) -> str:
    """Identical texts of all, and what became of the others."""
    if counts is None:
        return "-"
    total = sum(counts.values())
    text = f"{counts['same']}/{total}"
    if counts.get("ties"):
        text += f", {counts['ties']} at ties"
    if counts["different"]:
        text += f", {counts['different']} different"
    return text


def right_cell(counts: Mapping[str, int] | None) -> str:
    """Right answers of all."""
    return "-" if counts is None else f"{counts['right']}/{counts['answers']}"


def row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def cycle_table(result: Mapping[str, Any]) -> str:
    """Where the time goes, in milliseconds per generated token.

    Args:
        result: Content of a result file.

    Returns:
        Markdown: a row for each case of AdaDecode beside the baseline's total.
    """
    parts = ("segments", "gates", "draft bookkeeping", "verification", "rest")
    lines = [
        row(("batch", "variant", *parts, "ms per token", "baseline")),
        row(["---"] * (len(parts) + 4)),
    ]
    baseline: dict[int, float] = {}
    for case in result["cases"]:
        run, split = case["runs"][0], case["figures"]["time_split"]
        each = 1000 * run["seconds"] / run["tokens"]
        if split is None:
            baseline.setdefault(case["batch_size"], each)
            continue
        lines.append(
            row(
                (
                    str(case["batch_size"]),
                    case["label"],
                    *(f"{1000 * split[part] / run['tokens']:.1f}" for part in parts),
                    f"{each:.1f}",
                    f"{baseline[case['batch_size']]:.1f}",
                )
            )
        )
    return "\n".join(lines)


def unverified_table(result: Mapping[str, Any]) -> str:
    """How many texts would be others without verification.

    Args:
        result: Content of a result file.

    Returns:
        Markdown: a row for each case of AdaDecode.
    """
    lines = [row(("batch", "variant", "texts that verification corrected"))]
    lines.append(row(["---"] * 3))
    for case in result["cases"]:
        early = case["figures"]["early_predictions"]
        if early is not None:
            share = percent(early["contradicted_texts"])
            lines.append(row((str(case["batch_size"]), case["label"], share)))
    return "\n".join(lines)
