# SPDX-License-Identifier: Apache-2.0
"""From counters to what the page shows."""

from __future__ import annotations

from collections import deque
from typing import Any

from adadecode_vllm.engine.finished_requests import FinishedRequest
from adadecode_vllm.engine.metric_samples import Counted

WINDOW_SECONDS = 60.0
"""How far back "lately" goes."""

_LEAST_SECONDS = 0.5  # between two readings that are kept


class Lately:
    """Remembers readings of the last minute; as many as were asked for.

    For one thread at a time, with readings in the order in which they were taken.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self._readings: deque[tuple[float, Counted]] = deque()

    def since(self, now: float, counted: Counted) -> tuple[float, Counted] | None:
        """What was counted within the last minute, as far as it was read.

        Args:
            now: Seconds of the monotonic clock.
            counted: The counters now.

        Returns:
            The seconds between and what was added; None for the first reading.
        """
        readings = self._readings
        if readings and counted.since(readings[-1][1]).restarted:
            readings.clear()
        while len(readings) > 1 and now - readings[0][0] > WINDOW_SECONDS:
            readings.popleft()
        if not readings or now - readings[-1][0] >= _LEAST_SECONDS:
            readings.append((now, counted))
        began, before = readings[0]
        return (now - began, counted.since(before)) if now > began else None


def figures(
    counted: Counted, seconds: float | None, *, host_times: bool
) -> dict[str, Any]:
    """Figures of a period.

    Args:
        counted: What was counted in it.
        seconds: How long it was; None since the start, where that would say nothing.
        host_times: Whether the counters' times are those of the work: on CPUs.

    Returns:
        For JSON. Shares are in [0, 1]; what is divided by nothing is None.
    """
    totals = counted.totals
    exits: list[dict[str, Any]] = [
        {
            "layer": layer,
            "asked": int(exit_["gates"]),
            "predicted": int(exit_["early_predictions"]),
            "accepted": int(exit_["accepted"]),
            "rejected": int(exit_["rejected"]),
            "right": _ratio(exit_["accepted"], exit_["accepted"] + exit_["rejected"]),
        }
        for layer, exit_ in counted.per_exit.items()
    ]
    accepted = sum(exit_["accepted"] for exit_ in exits)
    generated = totals["generated_tokens"]
    return {
        "seconds": seconds,
        "generated_tokens": int(generated),
        "tokens_per_second": None if seconds is None else _ratio(generated, seconds),
        "target_forwards": int(totals["request_steps"]),
        "tokens_per_forward": _ratio(generated, totals["request_steps"]),
        "early_predictions": sum(exit_["predicted"] for exit_ in exits),
        "accepted": accepted,
        "accepted_share": _ratio(accepted, generated),
        "exits": exits,
        "ngram": {
            "drafted": int(totals["ngram_drafts"]),
            "accepted": int(totals["ngram_accepted"]),
            "rejected": int(totals["ngram_rejected"]),
        },
        "drafting_seconds": totals["drafting_seconds"],
        "verifying_seconds": totals["verifying_seconds"],
        "dropped": {
            reason: int(tokens) for reason, tokens in counted.dropped.items() if tokens
        },
        "measured_ratio": _ratio(totals["plain_seconds"], totals["compared_seconds"]),
        "estimated_ratio": estimated_ratio(counted) if host_times else None,
    }


def estimated_ratio(counted: Counted) -> float | None:
    """Estimate how much faster this is than plain decoding.

    A forward yields f tokens a request. It took the time V of a resumed forward and,
    before it, the time D of drafting, in which e + 1 tokens a request passed the layers
    up to their exits, e of them predicted early. Ordinary decoding would have passed
    those layers once: it would take V + D / (e + 1) for one token. Hence

        f (V + D / (e + 1)) / (V + D).

    It is an estimate. What a gate costs, and what a row more costs while verifying,
    counts for plain decoding here, so it tends to be too high: by a twentieth on a
    model of 135 M or more, and by far for one so small that the host's work is what a
    step waits for.

    Args:
        counted: Of a period; its times are those of the work itself.

    Returns:
        The ratio; None where no forward was counted, and for an exit at the embedding,
        behind which nothing is resumed, so that no time of verifying is known.
    """
    totals = counted.totals
    forwards = totals["request_steps"]
    if not forwards or 0 in counted.per_exit:
        return None
    early = sum(exit_["early_predictions"] for exit_ in counted.per_exit.values())
    drafting, verifying = totals["drafting_seconds"], totals["verifying_seconds"]
    baseline = verifying + drafting / (early / forwards + 1)
    share = baseline / (verifying + drafting) if verifying + drafting else 1.0
    return totals["generated_tokens"] / forwards * share


def request_figures(request: FinishedRequest) -> dict[str, Any]:
    """A request for the page's list."""
    return {
        "id": request.request_id,
        "ended": request.ended,
        "seconds": request.seconds,
        "reason": request.reason,
        "prompt_tokens": request.prompt_tokens,
        "tokens": request.tokens,
        "drafted": request.drafted,
        "accepted": request.accepted,
        "accepted_share": _ratio(request.accepted, request.tokens),
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
