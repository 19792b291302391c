# SPDX-License-Identifier: Apache-2.0
"""Whether two engines answered a stream alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.parity import first_difference
from tests.reliability.differential.case import Request

TOLERANCE = 2e-3
"""Of logprobs and logits: batches of other sizes round otherwise."""

Logprobs = Sequence[Mapping[int, tuple[float, int | None]] | None] | None


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same.

    Attributes:
        request: The request's number.
        sentence: What differs.
        token: Where a text parts: the completion's number and the index of its token;
            None for everything else.
    """

    request: int
    sentence: str
    token: tuple[int, int] | None = None


def differences(
    requests: Sequence[Request],
    baseline: Sequence[Mapping[str, Any]],
    ours: Sequence[Mapping[str, Any]],
) -> list[Difference]:
    """Compare the answers to a stream.

    Args:
        requests: The stream.
        baseline: Plain vLLM's answers, as `drive.Driver.run` gives them.
        ours: The other engine's.

    Returns:
        At most one difference for each request, the first that is found.
    """
    found = []
    for number, (request, expected, answer) in enumerate(
        zip(requests, baseline, ours, strict=True)
    ):
        difference = _answers(number, request, expected, answer)
        if difference is not None:
            found.append(difference)
    return found


def _answers(
    number: int,
    request: Request,
    expected: Mapping[str, Any],
    answer: Mapping[str, Any],
) -> Difference | None:
    if expected["error"] or answer["error"]:
        if expected["error"] and answer["error"]:
            return None
        return Difference(
            number,
            f"baseline vLLM says {expected['error'] or 'nothing against it'}, "
            f"AdaDecode {answer['error'] or 'nothing against it'}",
        )
    cut = expected["aborted"] or answer["aborted"]
    indices = expected["outputs"].keys() | answer["outputs"].keys()
    for index in sorted(indices):
        one, other = expected["outputs"].get(index), answer["outputs"].get(index)
        if one is None or other is None:
            if cut:
                continue
            return Difference(number, f"completion {index}: {one!r} and {other!r}")
        difference = _completions(number, index, one, other, bool(cut))
        if difference is not None:
            return difference
    one, other = expected["prompt_logprobs"], answer["prompt_logprobs"]
    if (one is None) != (other is None):
        if cut:
            return None
        return Difference(number, f"prompt_logprobs: {one is None} and {other is None}")
    sentence = _logprobs(one, other)
    if sentence is not None:
        return Difference(number, f"prompt_logprobs: {sentence}")
    return None


def _completions(
    number: int,
    index: int,
    expected: Mapping[str, Any],
    answer: Mapping[str, Any],
    cut: bool,
) -> Difference | None:
    one, other = expected["token_ids"], answer["token_ids"]
    if cut:
        shared = min(len(one), len(other))
        one, other = one[:shared], other[:shared]
    at = first_difference(one, other)
    if at is not None:
        return Difference(
            number,
            f"completion {index} parts at token {at}: {one[at : at + 8]} and "
            f"{other[at : at + 8]}",
            (index, at),
        )
    if not cut:
        for name in ("text", "finish_reason", "stop_reason"):
            if expected[name] != answer[name]:
                return Difference(
                    number,
                    f"completion {index}, {name}: {expected[name]!r} and "
                    f"{answer[name]!r}",
                )
        sums = expected["cumulative_logprob"], answer["cumulative_logprob"]
        if not _close(*sums, TOLERANCE * max(len(one), 1)):
            return Difference(
                number,
                f"completion {index}, cumulative_logprob: {sums[0]} and {sums[1]}",
            )
    first, second = expected["logprobs"], answer["logprobs"]
    if cut and first is not None and second is not None:
        first, second = first[: len(one)], second[: len(one)]
    sentence = _logprobs(first, second)
    if sentence is not None:
        return Difference(number, f"completion {index}, {sentence}")
    return None


def _logprobs(expected: Logprobs, answer: Logprobs) -> str | None:
    """What differs in two lists of logprobs by position."""
    if not expected and not answer:
        return None
    if expected is None or answer is None or len(expected) != len(answer):
        lengths = [None if one is None else len(one) for one in (expected, answer)]
        return f"logprobs: {lengths[0]} and {lengths[1]} positions"
    for position, (one, other) in enumerate(zip(expected, answer, strict=True)):
        if one is None or other is None:
            if one is not other:
                return f"logprobs at {position}: {one} and {other}"
            continue
        sentence = _position(one, other)
        if sentence is not None:
            return f"logprobs at {position}: {sentence}"
    return None


def _position(
    one: Mapping[int, tuple[float, int | None]],
    other: Mapping[int, tuple[float, int | None]],
) -> str | None:
    if len(one) != len(other):
        return f"{len(one)} and {len(other)} tokens"
    for token in one.keys() & other.keys():
        if not _close(one[token][0], other[token][0], TOLERANCE):
            return f"token {token}: {one[token][0]} and {other[token][0]}"
    # The last places of a ranking may be shared by other tokens that are as good.
    lasts = [min(value for value, _ in place.values()) for place in (one, other)]
    for token in one.keys() ^ other.keys():
        value = (one if token in one else other)[token][0]
        if not all(_close(value, last, TOLERANCE) for last in lasts):
            return f"token {token}, {value}, is only in one of them"
    return None


def _close(one: float | None, other: float | None, tolerance: float) -> bool:
    if one is None or other is None:
        return one is other
    if math.isfinite(one) and math.isfinite(other):
        return abs(one - other) <= tolerance
    return one == other or (math.isnan(one) and math.isnan(other))
