# SPDX-License-Identifier: Apache-2.0
"""The engine's drafting on answers that are known: no layer runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from adadecode_vllm.method.executor import TokenSubset

Scored = tuple[int, float]
"""An exit's top token and its probability under the head."""


@dataclass(frozen=True)
class Answer:
    """A request and what the model answers.

    Attributes:
        tokens: (n,) the answer, the model's own at temperature 0.
        scores: ``scores(prefix, drafted_by, exit_index)`` is what an exit says after
            the prompt and these answer tokens. The last of them are drafts that the
            exits `drafted_by` made, and may leave the answer.
        stops: Tokens that end the text.
        max_tokens: Most tokens the request may generate.
        length_limit: Most tokens that the model's length allows after the prompt.
        prompt: Tokens before the answer, which n-gram lookup reads.
    """

    tokens: Sequence[int]
    scores: Callable[[tuple[int, ...], tuple[int, ...], int], Scored]
    stops: Collection[int]
    max_tokens: int
    length_limit: int = 1 << 30
    prompt: Sequence[int] = ()


@dataclass
class _Front:
    """A request in a drafting cycle.

    Attributes:
        answer: The request.
        verified: Its verified answer tokens.
        drafts: Tokens that were drafted in this cycle.
        scored_by: By place in the window, the exit that scored it last. The one that
            made the draft behind it, where there is one.
    """

    answer: Answer
    verified: tuple[int, ...]
    drafts: list[int]
    scored_by: list[int]


class KnownExits:
    """Answers a :class:`~adadecode_vllm.method.drafting.Drafter` that asks exits.

    It prepares every step whole, so the drafter never runs a segment itself.

    Attributes:
        num_segments: As an executor's.
        exits_at_embedding: As an executor's.
        max_tokens: As a step runner's: no forward is resumed.
        segments_run: By segment, times it ran as if each request were alone.
        time: What the steps since :meth:`begin` took; of several requests, each as if
            it were alone where that is how they are timed.
        exit_seconds: As :meth:`adadecode_vllm.method.stats.Stats.exit_seconds`, of all
            steps.
    """

    max_tokens = 0

    def __init__(
        self,
        exit_layers: Sequence[int],
        num_layers: int,
        window: int,
        cost: Callable[[float, int, int], float],
        *,
        timed_alone: bool = False,
    ) -> None:
        """Prepare for a model.

        Args:
            exit_layers: Layer counts of the exits.
            num_layers: L.
            window: Tokens of a window, 1 + the cap.
            cost: ``cost(share, tokens, scored)``: what running a share of the layers
                for so many tokens, and scoring so many, takes.
            timed_alone: Whether requests take together what each takes alone.
        """
        self.exits_at_embedding = int(exit_layers[0] == 0)
        self.num_segments = len(exit_layers) + 1 - self.exits_at_embedding
        bounds = (0, *exit_layers, num_layers)
        sizes = np.diff(bounds)[self.exits_at_embedding :]
        self.shares: list[float] = (sizes / num_layers).tolist()
        self.segments_run = [0] * (len(exit_layers) + 1)
        self.time = 0.0
        self.exit_seconds = np.zeros((2, len(exit_layers)))
        self._window = window
        self._cost = cost
        self._timed_alone = timed_alone
        self._fronts: dict[int, _Front] = {}

    @property
    def steps(self) -> KnownExits:
        """What the drafter asks for whole steps."""
        return self

    def begin(self, answers: Sequence[tuple[int, Answer, int]]) -> None:
        """Start a cycle.

        Args:
            answers: Row, request and number of its verified answer tokens.
        """
        self.time = 0.0
        self._fronts = {
            row: _Front(answer, tuple(answer.tokens[:done]), [], [])
            for row, answer, done in answers
        }

    def draft(
        self,
        segment: int,
        subset: TokenSubset,
        states: np.ndarray,
        token_ids: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Say what the exit behind a segment says; see `StepRunner.draft`."""
        exit_index = segment + self.exits_at_embedding
        share = 0.0
        if segment >= 0:
            share = self.shares[segment]
            self.segments_run[exit_index] += subset.num_requests
        if self._timed_alone:
            tokens, requests = np.unique(subset.count, return_counts=True)
            took = sum(
                times * self._cost(share, count, 1)
                for count, times in zip(tokens.tolist(), requests.tolist(), strict=True)
            )
        else:
            took = self._cost(share, len(states), subset.num_requests)
        self.time += took
        self.exit_seconds[:, exit_index] += took, subset.num_requests
        last = np.cumsum(subset.count) - 1
        said = [
            self._score(self._fronts[row], place, token, exit_index)
            for row, place, token in zip(
                subset.rows.tolist(),
                (states[last] % self._window).tolist(),
                token_ids[last].tolist(),
                strict=True,
            )
        ]
        top, probabilities = zip(*said, strict=True)
        return np.array(top, np.int64), np.array(probabilities, np.float32)

    @staticmethod
    def _score(front: _Front, place: int, token: int, exit_index: int) -> Scored:
        """Score the token at a place of a window; the first one is verified."""
        if place:
            front.drafts[place - 1 :] = [token]
        front.scored_by[place:] = [exit_index]
        return front.answer.scores(
            (*front.verified, *front.drafts), tuple(front.scored_by[:place]), exit_index
        )
