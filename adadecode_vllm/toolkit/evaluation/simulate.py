# SPDX-License-Identifier: Apache-2.0
"""The engine's decoding cycles, played on known answers.

The answer of a model at temperature 0 is known, so nothing is generated: the simulation
walks along it and asks, at every token, what the exits would have said. Where a wrong
prediction leads off the answer, the model is run on that text too. Its counters are
therefore those of the engine, not an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

Gate = tuple[int, float]
"""An exit's top token and what the gate compares with the threshold."""


@dataclass
class Counters:
    """What the engine's `Stats` would count.

    Attributes:
        exit_layers: Layer counts of the exits.
        num_layers: L.
        early_predictions: By exit.
        accepted: By exit.
        rejected: By exit.
        gates: By exit, times it was asked.
        segments_run: By segment, while drafting and in all decoding forwards.
        forwards: Decoding forwards, each of which verifies.
        generated_tokens: Tokens that those yielded and that were kept.
    """

    exit_layers: tuple[int, ...]
    num_layers: int
    early_predictions: list[int] = field(init=False)
    accepted: list[int] = field(init=False)
    rejected: list[int] = field(init=False)
    gates: list[int] = field(init=False)
    segments_run: list[int] = field(init=False)
    forwards: int = 0
    generated_tokens: int = 0

    def __post_init__(self) -> None:
        """Start at zero."""
        exits = len(self.exit_layers)
        self.early_predictions = [0] * exits
        self.accepted = [0] * exits
        self.rejected = [0] * exits
        self.gates = [0] * exits
        self.segments_run = [0] * (exits + 1)

    @property
    def tokens_per_forward(self) -> float:
        """Tokens per full forward."""
        return self.generated_tokens / max(1, self.forwards)

    @property
    def acceptance(self) -> float:
        """Share of verified early predictions that were right."""
        right, wrong = sum(self.accepted), sum(self.rejected)
        return right / max(1, right + wrong)

    @property
    def coverage(self) -> float:
        """Share of tokens that were accepted early predictions."""
        return sum(self.accepted) / max(1, self.generated_tokens)


@dataclass(frozen=True)
class Answer:
    """A request and what the model answers.

    Attributes:
        tokens: (n,) the answer, the model's own at temperature 0.
        gates: ``gates(prefix, drafted_by, exit_index)`` returns what an exit says after
            the prompt and these answer tokens. The last of them are drafts that the
            exits `drafted_by` made, and may leave the answer.
        stops: Tokens that end the text.
        max_tokens: Most tokens the request may generate.
        length_limit: Most tokens that the model's length allows after the prompt.
    """

    tokens: Sequence[int]
    gates: Callable[[tuple[int, ...], tuple[int, ...], int], Gate]
    stops: Collection[int]
    max_tokens: int
    length_limit: int = 1 << 30


def simulate(
    answer: Answer,
    counters: Counters,
    thresholds: Sequence[float],
    max_early_predictions: int,
    guess_threshold: float = math.inf,
) -> None:
    """Decode one answer and add to the counters.

    Args:
        answer: The answer.
        counters: Added to.
        thresholds: By exit, the value that the gate must exceed.
        max_early_predictions: The cap.
        guess_threshold: What an unsure guess of the last exit must exceed to be
            submitted.
    """
    tokens = list(answer.tokens)
    done = 1  # the prefill's forward yields the first token
    while done < len(tokens):
        limit = min(
            max_early_predictions,
            answer.max_tokens - done - 1,
            answer.length_limit - done - 1,
        )
        # As in method.drafting: levels of the window's tokens, newest last.
        drafts: list[int] = []
        exits: list[int] = []
        levels = [0]
        if limit > 0:
            _draft(
                answer,
                counters,
                thresholds,
                limit,
                tokens[:done],
                drafts,
                exits,
                levels,
                guess_threshold,
            )
        accepted = 0
        for draft, exit_index in zip(drafts, exits, strict=True):
            if done + accepted >= len(tokens) or draft != tokens[done + accepted]:
                counters.rejected[exit_index] += 1
                break
            counters.accepted[exit_index] += 1
            accepted += 1
        lowest = min(levels)
        for segment in range(lowest, len(counters.segments_run)):
            counters.segments_run[segment] += 1
        counters.forwards += 1
        kept = min(accepted + 1, len(tokens) - done)
        counters.generated_tokens += kept
        done += kept


def _draft(
    answer: Answer,
    counters: Counters,
    thresholds: Sequence[float],
    limit: int,
    prefix: list[int],
    drafts: list[int],
    exits: list[int],
    levels: list[int],
    guess_threshold: float,
) -> None:
    """One drafting cycle of one request; the lists are extended in place."""
    last_exit = len(thresholds) - 1
    while True:
        segment = levels[-1]
        for index, level in enumerate(levels):
            if level == segment:
                levels[index] = segment + 1
        counters.segments_run[segment] += 1
        counters.gates[segment] += 1
        token, confidence = answer.gates((*prefix, *drafts), tuple(exits), segment)
        confident = confidence > thresholds[segment]
        guess = segment == last_exit and confidence > guess_threshold
        if confident or guess:
            drafts.append(token)
            exits.append(segment)
            levels.append(0)
            counters.early_predictions[segment] += 1
            if not confident or len(drafts) >= limit or token in answer.stops:
                return
        elif segment == last_exit:
            return


def total(
    answers: Sequence[Answer],
    exit_layers: Sequence[int],
    num_layers: int,
    thresholds: Sequence[float],
    max_early_predictions: int,
    guess_threshold: float = math.inf,
) -> Counters:
    """Simulate all answers.

    Args:
        answers: The answers.
        exit_layers: Layer counts of the exits.
        num_layers: L.
        thresholds: By exit.
        max_early_predictions: The cap.
        guess_threshold: See `simulate`.

    Returns:
        Their counters.
    """
    counters = Counters(tuple(exit_layers), num_layers)
    for answer in answers:
        simulate(answer, counters, thresholds, max_early_predictions, guess_threshold)
    return counters
