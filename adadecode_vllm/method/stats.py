# SPDX-License-Identifier: Apache-2.0
"""Counters of one worker, since its start or the last reset."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

REPORTED_PER_EXIT = ("early_predictions", "accepted", "rejected", "gates")
REPORTED = (
    "request_steps",
    "generated_tokens",
    "ngram_drafts",
    "ngram_accepted",
    "ngram_rejected",
    "resumed_tokens",
    "resumed_forwards",
    "drafting_seconds",
    "verifying_seconds",
)
"""The counters that a server's metrics show, in the order of ``reported``."""


@dataclass
class Stats:
    """What early prediction did and what it cost.

    A draft that follows a rejected one in the same cycle is never compared with the
    model's choice: it is neither accepted nor rejected. The same holds for drafts that
    the scheduler trimmed. So ``accepted + rejected <= early_predictions``.

    Attributes:
        exit_layers: Layer counts of the exits, in order.
        num_layers: L.
        early_predictions: Tokens predicted at each exit.
        accepted: Of those, confirmed by the final layer.
        rejected: Of those, contradicted by the final layer.
        contradicted_requests: Requests with at least one rejected early prediction:
            without verification their text would be another.
        draft_steps: Times each segment ran while drafting.
        gates: Times each exit head scored, in tokens.
        segments_run: Calls of each segment, while drafting and in resumed forwards.
        token_layers: Tokens times layers run by each segment in those calls.
        request_steps: Full forwards, counted per decoding request.
        generated_tokens: Tokens that those yielded.
        ngram_drafts: Drafts by n-gram lookup.
        ngram_accepted: Of those, confirmed by the final layer.
        ngram_rejected: Of those, contradicted by the final layer.
        resumed_tokens: Tokens that entered a forward with work already done.
        resumed_forwards: Forwards with at least one resumed token.
        draft_segment_seconds: Wall time of each segment while drafting.
        gate_seconds: Wall time of each exit's head.
        asking_seconds: Wall time of asking each exit: those two, and what the host
            decides then.
        drafting_seconds: Wall time spent drafting, that included.
        verifying_seconds: Wall time of resumed forwards.
    """

    exit_layers: tuple[int, ...]
    num_layers: int
    early_predictions: np.ndarray = field(init=False)
    accepted: np.ndarray = field(init=False)
    rejected: np.ndarray = field(init=False)
    contradicted_requests: int = field(init=False)
    draft_steps: np.ndarray = field(init=False)
    gates: np.ndarray = field(init=False)
    segments_run: np.ndarray = field(init=False)
    token_layers: np.ndarray = field(init=False)
    request_steps: int = field(init=False)
    generated_tokens: int = field(init=False)
    ngram_drafts: int = field(init=False)
    ngram_accepted: int = field(init=False)
    ngram_rejected: int = field(init=False)
    resumed_tokens: int = field(init=False)
    resumed_forwards: int = field(init=False)
    draft_segment_seconds: np.ndarray = field(init=False)
    gate_seconds: np.ndarray = field(init=False)
    asking_seconds: np.ndarray = field(init=False)
    drafting_seconds: float = field(init=False)
    verifying_seconds: float = field(init=False)

    def __post_init__(self) -> None:
        """Start all counters at zero."""
        self.reset()

    def reset(self) -> None:
        """Set all counters to zero."""
        exits = len(self.exit_layers)
        self.early_predictions = np.zeros(exits, np.int64)
        self.accepted = np.zeros(exits, np.int64)
        self.rejected = np.zeros(exits, np.int64)
        self.contradicted_requests = 0
        self.draft_steps = np.zeros(exits, np.int64)
        self.gates = np.zeros(exits, np.int64)
        self.segments_run = np.zeros(exits + 1, np.int64)
        self.token_layers = np.zeros(exits + 1, np.int64)
        self.request_steps = 0
        self.generated_tokens = 0
        self.ngram_drafts = 0
        self.ngram_accepted = 0
        self.ngram_rejected = 0
        self.resumed_tokens = 0
        self.resumed_forwards = 0
        self.draft_segment_seconds = np.zeros(exits + 1)
        self.gate_seconds = np.zeros(exits)
        self.asking_seconds = np.zeros(exits)
        self.drafting_seconds = 0.0
        self.verifying_seconds = 0.0

    def count_segment(self, segment: int, tokens: int) -> None:
        """Count one call of a segment with layers on so many tokens."""
        # An exit at the embedding ends a segment without any, which never runs.
        segment += self.exit_layers[0] == 0
        bounds = (0, *self.exit_layers, self.num_layers)
        self.segments_run[segment] += 1
        self.token_layers[segment] += tokens * (bounds[segment + 1] - bounds[segment])

    def record_acceptance(self, exits: np.ndarray, accepted: int) -> None:
        """Count the outcome of one request's verified drafts.

        Args:
            exits: (m,) int8, the exit of each draft that was verified, in order; below
                0 for those by n-gram lookup.
            accepted: Number of drafts that were accepted, 0 .. m.
        """
        confirmed = exits[:accepted]
        early = confirmed >= 0
        np.add.at(self.accepted, confirmed[early], 1)
        self.ngram_accepted += int(np.count_nonzero(~early))
        if accepted < len(exits):
            if exits[accepted] >= 0:
                self.rejected[exits[accepted]] += 1
            else:
                self.ngram_rejected += 1

    def exit_seconds(self) -> np.ndarray:
        """What asking the exits took.

        Returns:
            (2, K) float64: seconds of draft steps, with what the host decides between
            them, and tokens that were scored in them. None of them ever gets less.
        """
        return np.stack([self.asking_seconds, self.gates])

    def reported(self) -> np.ndarray:
        """The counters of `REPORTED_PER_EXIT` and `REPORTED`; float64.

        Returns:
            (4 K + 9,): K numbers for each counter per exit, then the others.
        """
        return np.concatenate(
            [
                *(getattr(self, name) for name in REPORTED_PER_EXIT),
                [getattr(self, name) for name in REPORTED],
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """All counters as plain numbers and lists, e.g. for JSON."""
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in asdict(self).items()
        }
