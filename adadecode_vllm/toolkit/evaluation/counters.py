# SPDX-License-Identifier: Apache-2.0
"""What the simulation counts, and what it asks costs for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Counters:
    """What the engine's `Stats` would count.

    Attributes:
        exit_layers: Layer counts of the exits.
        num_layers: L.
        early_predictions: By exit.
        accepted: By exit.
        rejected: By exit.
        gates: By exit, times it scored.
        segments_run: By segment, while drafting and in all decoding forwards, as if
            each request were alone.
        ngram_drafts: Drafts by n-gram lookup.
        ngram_accepted: Of those, confirmed by the model.
        ngram_rejected: Of those, contradicted by the model.
        forwards: Decoding forwards, each of which verifies.
        generated_tokens: Tokens that those yielded and that were kept.
        time: What decoding took by the costs that were given, in their unit.
    """

    exit_layers: tuple[int, ...]
    num_layers: int
    early_predictions: list[int] = field(init=False)
    accepted: list[int] = field(init=False)
    rejected: list[int] = field(init=False)
    gates: list[int] = field(init=False)
    segments_run: list[int] = field(init=False)
    ngram_drafts: int = 0
    ngram_accepted: int = 0
    ngram_rejected: int = 0
    forwards: int = 0
    generated_tokens: int = 0
    time: float = 0.0

    def __post_init__(self) -> None:
        """Start at zero."""
        exits = len(self.exit_layers)
        self.early_predictions = [0] * exits
        self.accepted = [0] * exits
        self.rejected = [0] * exits
        self.gates = [0] * exits
        self.segments_run = [0] * (exits + 1)

    def add(self, other: Counters) -> None:
        """Add those of other answers, decoded likewise.

        Args:
            other: With the same exits.
        """
        for name, value in vars(other).items():
            if name in ("exit_layers", "num_layers"):
                continue
            own = getattr(self, name)
            if isinstance(value, list):
                own[:] = [a + b for a, b in zip(own, value, strict=True)]
            else:
                setattr(self, name, own + value)

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


class StepCosts:
    """What the parts of a step take, in the caller's unit; here it is nothing."""

    def drafting(self, share: float, tokens: int, scored: int) -> float:
        """A segment and the exit behind it.

        Args:
            share: The segment's share of the layers; 0 for an exit at the embedding.
            tokens: Tokens that the segment runs.
            scored: Tokens that the exit scores.

        Returns:
            What they take together.
        """
        return 0.0

    def verifying(self, segments: Sequence[tuple[float, int]]) -> float:
        """A forward, with the LM head.

        Args:
            segments: Each segment's share of the layers, and the tokens that it runs;
                the last one runs all that are verified.

        Returns:
            What it takes.
        """
        return 0.0
