# SPDX-License-Identifier: Apache-2.0
"""From runs to figures: medians with spread, latencies, acceptance, parity."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

Run = dict[str, Any]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def tokens_per_s(run: Run) -> float:
    """Output tokens per second of a run."""
    return sum(map(len, run["token_ids"])) / run["seconds"]


def tokens_per_forward(run: Run) -> float:
    """Tokens that a full forward of the target yields, counted per request.

    Every forward of a request yields one token of its own and those of its drafts that
    were accepted. The prompt's forward counts, and so does its token.
    """
    tokens = sum(map(len, run["token_ids"]))
    if run.get("forwards"):
        return tokens / run["forwards"]
    stats = run["stats"]
    if stats is not None:
        return stats["generated_tokens"] / max(1, stats["request_steps"])
    # Steps without drafts are not counted by vLLM: they are told from what is left of
    # the tokens, the prompts' own at least. Not from all accepted drafts, because those
    # beyond a text's end count as accepted too.
    drafted, accepted = run["speculation"]["drafts"], run["speculation"]["accepted"]
    others = max(len(run["ttft_s"]), tokens - drafted - accepted)
    return tokens / (drafted + others)


def early_predictions(run: Run) -> dict[str, Any] | None:
    """Rate, acceptance and share of early predictions; None for other variants.

    Returns:
        ``rate``, early predictions per generated token; ``coverage``, the share of
        generated tokens that were early predictions; ``acceptance`` in all;
        ``by_exit``, for each exit ``[layer, early predictions, acceptance]``, where the
        acceptance is None if nothing was verified; and ``contradicted_texts``, the
        share of texts that would be others without verification.
    """
    stats = run["stats"]
    if stats is None:
        return None
    tokens = max(1, stats["generated_tokens"])
    by_exit = [
        [layer, count, right / (right + wrong) if right + wrong else None]
        for layer, count, right, wrong in zip(
            stats["exit_layers"],
            stats["early_predictions"],
            stats["accepted"],
            stats["rejected"],
            strict=True,
        )
    ]
    right, wrong = sum(stats["accepted"]), sum(stats["rejected"])
    return {
        "rate": sum(stats["early_predictions"]) / tokens,
        "coverage": right / tokens,
        "acceptance": right / (right + wrong) if right + wrong else None,
        "by_exit": by_exit,
        "contradicted_texts": stats["contradicted_requests"] / len(run["token_ids"]),
    }


def drafted_acceptance(run: Run) -> float | None:
    """Share of verified drafts that were right; None where there was none."""
    early = early_predictions(run)
    if early is not None:
        return early["acceptance"]
    counts = run["speculation"]
    if not counts or not counts["draft_tokens"]:
        return None
    return counts["accepted"] / counts["draft_tokens"]


def time_split(run: Run) -> dict[str, float] | None:
    """Seconds by part of the cycle; None for variants other than AdaDecode.

    Returns:
        ``segments`` while drafting, ``gates``, ``draft bookkeeping``, ``verification``
        (the resumed forwards) and ``rest``: sampling, scheduling, plain forwards.
        On CUDA segments hold the gates and bookkeeping is all that is not the device's.
    """
    stats = run["stats"]
    if stats is None:
        return None
    segments = sum(stats["draft_segment_seconds"])
    gates = sum(stats["gate_seconds"])
    drafting, verifying = stats["drafting_seconds"], stats["verifying_seconds"]
    if device := stats.get("device_seconds"):
        # Graphs hold segments and gates in one; the host does not wait for forwards.
        segments, gates = device.get("draft steps", [segments])[0], 0.0
        prefetching = device.get("prefetched segments", [0.0])[0]
        verifying = prefetching + device.get("resumed forwards", [verifying])[0]
    return {
        "segments": segments,
        "gates": gates,
        "draft bookkeeping": max(0.0, drafting - segments - gates),
        "verification": verifying,
        "rest": max(0.0, run["seconds"] - drafting - verifying),
    }


def draft_step_overhead(run: Run) -> float | None:
    """Seconds of a draft step in which the device ran neither layers nor a head.

    Returns:
        The mean; None where the device's time of some step was not measured: on CPUs,
        and where a step did not run in one graph.
    """
    stats = run["stats"]
    measured = ((stats or {}).get("device_seconds") or {}).get("draft steps")
    if stats is None or measured is None or measured[1] != sum(stats["draft_steps"]):
        return None
    return (stats["drafting_seconds"] - measured[0]) / measured[1]


def pooled(runs: Sequence[Run]) -> Run:
    """One run of all texts, with what :func:`early_predictions` reads, summed."""
    stats = runs[0]["stats"]
    if stats is not None:
        parts = [run["stats"] for run in runs]
        stats = {"exit_layers": stats["exit_layers"]}
        for name in ("generated_tokens", "contradicted_requests"):
            stats[name] = sum(part[name] for part in parts)
        for name in ("early_predictions", "accepted", "rejected"):
            by_exit = zip(*(part[name] for part in parts), strict=True)
            stats[name] = [sum(counts) for counts in by_exit]
    counted = [run["speculation"] for run in runs if run["speculation"]]
    return {
        "token_ids": [ids for run in runs for ids in run["token_ids"]],
        "speculation": {
            name: sum(counts[name] for counts in counted)
            for name in ("draft_tokens", "accepted")
        },
        "stats": stats,
    }


def percentiles(runs: Sequence[Run], key: str) -> dict[str, float | None]:
    """Median and 99th percentile over all requests of all runs, in milliseconds."""
    values = [1000 * v for run in runs for v in run[key] if v is not None]
    if not values:
        return {"p50": None, "p99": None}
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50": float(p50), "p99": float(p99)}


def summarize(runs: Sequence[Run], baseline: Sequence[Run]) -> dict[str, Any]:
    """Figures of one case.

    Args:
        runs: Its runs, in order; ``parity`` in each, if texts were compared.
        baseline: The baseline's, run for run in the same repeat.

    Returns:
        The figures; ratios are taken pair by pair.
    """
    speeds = [tokens_per_s(run) for run in runs]
    ratios = [
        speed / tokens_per_s(other)
        for speed, other in zip(speeds, baseline, strict=True)
    ]
    parities = [run["parity"] for run in runs if run.get("parity")]
    whole = pooled(runs)
    figures: dict[str, Any] = {
        "tokens_per_s": spread(speeds),
        "ratio": spread(ratios),
        "ttft_ms": percentiles(runs, "ttft_s"),
        "tpot_ms": percentiles(runs, "tpot_s"),
        "tokens_per_forward": statistics.median(map(tokens_per_forward, runs)),
        "acceptance": drafted_acceptance(whole),
        "early_predictions": early_predictions(whole),
        "time_split": time_split(runs[0]),
        "draft_step_overhead_us": None,
    }
    overheads = [draft_step_overhead(run) for run in runs]
    if measured := [seconds for seconds in overheads if seconds is not None]:
        figures["draft_step_overhead_us"] = 1e6 * statistics.median(measured)
    if parities:
        figures["texts"] = {
            name: sum(parity[name] for parity in parities)
            for name in ("same", "ties", "different")
        }
    if "right" in runs[0]:
        # Repeats of the same prompts count once.
        by_prompts = {tuple(run["prompts"]): run["right"] for run in runs}
        right = [answer for part in by_prompts.values() for answer in part]
        figures["right"] = {"right": sum(right), "answers": len(right)}
    predictions = [
        run["predicted_speedup"] for run in runs if "predicted_speedup" in run
    ]
    if predictions:
        figures["predicted_speedup"] = statistics.median(predictions)
        figures["efficiency"] = spread(
            [ratio / p for ratio, p in zip(ratios, predictions, strict=True)]
        )
    return figures
