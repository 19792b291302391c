# SPDX-License-Identifier: Apache-2.0
"""The figures and the table of the serving benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.analysis import percentiles, spread
from benchmarks.client import Load
from benchmarks.tables import latency, percent, row, texts_cell, variant_notes
from benchmarks.tables import spread as spread_cell

_COLUMNS = (
    "load",
    "variant",
    "tok/s (min-max)",
    "ratio (min-max)",
    "requests/s",
    "TTFT ms p50 / p99",
    "TPOT ms p50 / p99",
    "drafts per token",
    "accepted",
    "identical texts",
    "failed requests",
)


def compare_texts(
    baseline: Sequence[str | None], texts: Sequence[str | None]
) -> dict[str, int]:
    """Count ``same`` and ``different`` texts, where both requests were completed."""
    pairs = [
        expected == text
        for expected, text in zip(baseline, texts, strict=True)
        if expected is not None and text is not None
    ]
    return {"same": sum(pairs), "different": len(pairs) - sum(pairs)}


def summarize(
    runs: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Figures of one case.

    Args:
        runs: Its runs, in order.
        baseline: The baseline's, run for run in the same repeat.

    Returns:
        The figures; ratios are taken pair by pair. ``drafts`` are vLLM's counters,
        which tell exits and lookup as little apart as one exit from another: ``rate``,
        drafts per token, ``coverage``, the share of tokens that were drafts, and
        ``acceptance``; None where nothing was drafted.
    """
    found = [dict(run) for run in runs]
    speeds = [run["tokens_per_s"] for run in runs]
    tokens = sum(run["tokens"] for run in runs)
    drafted = sum(run["speculation"]["draft_tokens"] for run in runs)
    accepted = sum(run["speculation"]["accepted"] for run in runs)
    acceptance = accepted / drafted if drafted else None
    drafts = {
        "rate": drafted / max(1, tokens),
        "coverage": accepted / max(1, tokens),
        "acceptance": acceptance,
    }
    figures: dict[str, Any] = {
        "tokens_per_s": spread(speeds),
        "ratio": spread(
            [
                speed / other["tokens_per_s"]
                for speed, other in zip(speeds, baseline, strict=True)
            ]
        ),
        "requests_per_s": spread([run["requests_per_s"] for run in runs]),
        "ttft_ms": percentiles(found, "ttft_s"),
        "tpot_ms": percentiles(found, "tpot_s"),
        "e2el_ms": percentiles(found, "e2el_s"),
        "failed_requests": sum(run["failed"] for run in runs),
        "requests": sum(run["completed"] + run["failed"] for run in runs),
        "acceptance": acceptance,
        "drafts": drafts if drafted else None,
    }
    compared = [run["parity"] for run in runs if "parity" in run]
    if compared:
        figures["texts"] = {
            name: sum(counts[name] for counts in compared)
            for name in ("same", "different")
        }
    return figures


def serving_table(results: Mapping[str, Any]) -> str:
    """One row per case, then a line per variant that was not measured, as Markdown."""
    lines = [row(_COLUMNS), row(["---"] * len(_COLUMNS))]
    lines += [row(_cells(case)) for case in results["cases"]]
    return "\n".join([*lines, *variant_notes(results)])


def _cells(case: Mapping[str, Any]) -> list[str]:
    figures = case["figures"]
    drafts = figures["drafts"]
    return [
        Load(case["concurrency"], case["request_rate"]).label,
        case["label"],
        spread_cell(figures["tokens_per_s"]),
        spread_cell(figures["ratio"]),
        f"{figures['requests_per_s']['median']:.2f}",
        latency(figures["ttft_ms"]),
        latency(figures["tpot_ms"]),
        "-" if drafts is None else f"{drafts['rate']:.2f}",
        percent(figures["acceptance"]),
        texts_cell(figures.get("texts")),
        f"{figures['failed_requests']}/{figures['requests']}",
    ]
